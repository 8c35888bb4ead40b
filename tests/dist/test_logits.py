"""Logits of the package's Megatron models against transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.dist.logits import LENGTHS, YARN, rank_logits, rows
from tests.support.dist.spawn import run_ranks
from tests.support.hf_models import KINDS, import_transformers, make_hf_model

SCALED = {
    "qwen2_yarn": ("qwen2", YARN),
    "qwen3_yarn": ("qwen3", {**YARN, "attention_factor": 1.5, "beta_fast": 8, "beta_slow": 2, "truncate": False}),
    "llama_yarn": ("llama", {**YARN, "mscale": 0.707, "mscale_all_dim": 1.5}),
    "llama_linear": ("llama", {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}),
}
"""Kinds with scaled positions; two of the rows have sequences longer than the original positions."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hf")
    plain = {kind: make_hf_model(kind, root / kind) for kind in KINDS}
    scaled = {
        name: make_hf_model(kind, root / name, rope_parameters=dict(rope)) for name, (kind, rope) in SCALED.items()
    }
    return plain | scaled


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> dict[str, list[np.ndarray]]:
    """Return transformers' logits, one sequence at a time."""
    logits = {}
    for kind, path in models.items():
        oracle = import_transformers().AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            logits[kind] = [
                np.concatenate([oracle(torch.tensor(s)[None]).logits[0].numpy() for s in row]) for row in rows()
            ]
    return logits


@pytest.mark.parametrize(
    ("world_size", "axes"),
    [
        (1, {}),
        (2, {"tensor": 2}),
        (2, {"pipeline": 2}),
        (2, {"pipeline": 2, "virtual_pipeline": 2}),
        (4, {"tensor": 2, "pipeline": 2, "first_stage_layers": 3}),
        (2, {"tensor": 2, "sequence": True}),
    ],
)
def test_packed_logits_equal_transformers(world_size, axes, models, expected) -> None:
    results = run_ranks(world_size, rank_logits, [str(path) for path in models.values()], axes)
    last_stage = [result for result in results if result is not None]
    assert len(last_stage) == axes.get("tensor", 1)
    for result in last_stage:
        for kind, logits in zip(models, result, strict=True):
            for ours, theirs in zip(logits, expected[kind], strict=True):
                np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0, err_msg=kind)


def test_without_its_scaling_a_model_has_other_logits(models, expected) -> None:
    """The tolerance above notices missing scaling, on short sequences too (by the attention factor)."""
    load = import_transformers().AutoModelForCausalLM.from_pretrained
    for name in SCALED:
        plain = load(
            models[name], dtype=torch.float32, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}
        )
        with torch.no_grad():
            logits = plain(torch.tensor(rows()[0][1])[None]).logits[0].numpy()
        start = LENGTHS[0][0]
        assert np.abs(logits - expected[name][0][start : start + LENGTHS[0][1]]).max() > 1e-2, name
