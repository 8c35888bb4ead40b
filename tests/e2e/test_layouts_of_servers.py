"""The parameters that a plan fills on each rank of a server, against SGLang's own classes and loaders.

For every family, SGLang builds the model of each of four ranks and loads an HF folder. Nothing is served.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.hf_models import make_hf_model

PROGRAM = Path(__file__).parents[1] / "support" / "sglang_layouts.py"
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {}),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3, one head of keys": ("qwen3", {"num_key_value_heads": 1}),
    "qwen3_moe": ("qwen3_moe", {}),
    "moonlight": ("moonlight", {}),
    "deepseek_v3": ("deepseek_v3", {}),
    "glm4_moe": ("glm4_moe", {}),
    "gpt_oss": ("gpt_oss", {}),
}
"""Name → kind of model and its sizes."""
LAYOUTS: dict[str, tuple[str, ...]] = {
    "one copy": (),
    "two copies": ("--attn-dp-size", "2"),
    "four copies": ("--attention-data-parallel-size=4",),
    "four copies by the old flags": ("--enable-dp-attention", "--dp-size", "4"),
    "output layer of each copy": ("--attn-dp-size", "2", "--enable-dp-lm-head"),
}
WITH_EXPERTS: dict[str, tuple[str, ...]] = {
    "whole dense layers": ("--moe-dense-tp-size", "1"),
    "experts shared out": ("--attn-dp-size", "2", "--ep-size", "2", "--moe-dense-tp-size", "1"),
    "experts of each rank": ("--attn-dp-size", "4", "--ep-size", "4", "--enable-dp-lm-head"),
}
WITH_SHARED = ("moonlight", "deepseek_v3", "glm4_moe")
BACKENDS = ("deepep", "mooncake", "nixl", "mori", "ascend_fuseep", "flashinfer")


def cases(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the cases by name."""
    made: dict[str, dict[str, Any]] = {}
    for name, (kind, sizes) in KINDS.items():
        path = folder / name.replace(", ", "_").replace(" ", "_")
        model = str(make_hf_model(kind, path, seed=1, **sizes))
        # With 131 entries, ranks could not share an output layer by --enable-dp-lm-head.
        unpadded = str(make_hf_model(kind, path.with_name(path.name + "_unpadded"), seed=1, **sizes, vocab_size=192))
        layouts = dict(LAYOUTS) if kind in ("qwen3", "gpt_oss") else {**LAYOUTS, **WITH_EXPERTS}
        more = ("--disable-shared-experts-fusion",) if kind in WITH_SHARED else ()
        for layout, flags in layouts.items():
            of_layout = unpadded if layout == "output layer of each copy" else model
            made[f"{name}: {layout}"] = {"folder": of_layout, "tensor": 4, "extra_args": [*flags, *more]}
        for backend in BACKENDS if kind in WITH_SHARED else ():
            extra = ["--attn-dp-size", "4", "--ep-size", "4", *more]
            made[f"{name}: {backend}"] = {"folder": model, "tensor": 4, "extra_args": extra, "backend": backend}
    return made


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("models")
    made = cases(folder)
    file = folder / "cases.json"
    file.write_text(json.dumps(list(made.values())), encoding="utf-8")
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    run = subprocess.run(
        [sys.executable, str(PROGRAM), str(file)], env=env, cwd=folder, capture_output=True, text=True, timeout=500
    )
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line.removeprefix("RESULT ") for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    return dict(zip(made, map(json.loads, lines), strict=True))


@pytest.mark.parametrize("name", KINDS)
def test_sglangs_loaders_put_into_every_rank_what_the_plan_puts_there(
    name: str, results: dict[str, dict[str, Any]]
) -> None:
    own = {case: result for case, result in results.items() if case.startswith(f"{name}: ")}
    assert len(own) >= len(LAYOUTS)
    for case, result in own.items():
        assert result["problems"] == [], case
        assert result["compared"] > 4 * 30, case


def test_the_layouts_differ(results: dict[str, dict[str, Any]]) -> None:
    """Otherwise SGLang did not take the flags, and the comparison would prove nothing."""
    for name in KINDS:
        held = [results[f"{name}: {layout}"]["elements"] for layout in ("one copy", "two copies", "four copies")]
        assert held == sorted(set(held)), name
