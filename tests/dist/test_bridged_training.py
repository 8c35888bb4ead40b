"""Whole runs of models whose sizes and names come from Megatron-Bridge: training, resume and export."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.bridged_models import KINDS, NEEDS_BRIDGE, make_bridged_model
from tests.support.dist.spawn import run_ranks
from tests.support.e2e.parity_task import write_task
from tests.support.slow import slow_unless

pytestmark = NEEDS_BRIDGE
LAYOUTS: dict[str, dict[str, Any]] = {
    "sequence": {"tensor": 2, "sequence": True},
    "pipeline": {"pipeline": 2},
    "interleaved": {"pipeline": 2, "virtual_pipeline": 2},
    "context": {"context": 2},
    "data": {},
}
IN_EVERY_RUN = [("nemotron", "sequence"), ("nemotron", "interleaved"), ("gemma", "pipeline"), ("gemma", "context")]
"""Cases that are not left to the slow tests."""
RANKS = 2


def rank_run(config: str, steps: int) -> int:
    """Run training up to a number of steps; return it."""
    from megatron_dypo.config.reading.load import load_config
    from megatron_dypo.loop.train import train

    train(load_config(config, [f"run.steps={steps}"]))
    return steps


def write_run(folder: Path, kind: str, axes: dict[str, Any], **model: Any) -> Path:
    """Write the task, model and config of a supervised run; return the config's path."""
    folder.mkdir(exist_ok=True)
    config = write_task(
        folder,
        model={"family": "bridge", **model},
        parallel=axes,
        objective={"name": "sft"},
        run={"dir": str(folder / "run"), "watchdog_s": 0},
        logging={"tensorboard": False},
    )
    vocabulary = json.loads((folder / "model" / "config.json").read_text())["vocab_size"]
    for old in (folder / "model").glob("*.safetensors"):
        old.unlink()
    make_bridged_model(kind, folder / "model", vocab_size=vocabulary + vocabulary % 2)
    return config


def exported(run: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in (run / "hf").glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def learned(folder: Path, kind: str, axes: dict[str, Any], ranks: int, **model: Any) -> list[tuple[float, float]]:
    """Train two steps; return loss and gradient norm of each."""
    assert run_ranks(ranks, rank_run, str(write_run(folder, kind, axes, **model)), 2) == [2] * ranks
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [step for step in map(json.loads, lines) if "train/grad_norm" in step]
    return [(step["train/loss"], step["train/grad_norm"]) for step in steps]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[float, float]]]:
    """Return, by kind of model, loss and gradient norm of its two steps on one rank."""
    root = tmp_path_factory.mktemp("alone")
    return {kind: learned(root / kind, kind, {}, 1) for kind in KINDS}


@pytest.mark.parametrize(
    ("kind", "layout"),
    slow_unless(
        lambda case: case in IN_EVERY_RUN,
        [case for case in itertools.product(KINDS, LAYOUTS) if case != ("gemma", "interleaved")],
    ),
)
def test_losses_and_gradients_are_those_of_one_rank(kind, layout, alone, tmp_path) -> None:
    found = learned(tmp_path, kind, LAYOUTS[layout], RANKS)
    assert len(found) == 2
    torch.testing.assert_close(torch.tensor(found), torch.tensor(alone[kind]), rtol=1e-4, atol=0)


def test_a_model_in_bfloat16_learns_and_is_exported_in_it(tmp_path) -> None:
    losses = [loss for loss, _ in learned(tmp_path, "gemma", {"pipeline": 2}, RANKS, dtype="bfloat16")]
    assert all(map(math.isfinite, losses))
    assert losses[1] < losses[0]
    assert {tensor.dtype for tensor in exported(tmp_path / "run").values()} == {torch.bfloat16}


def test_a_run_resumes_and_exports_every_tensor_changed(tmp_path) -> None:
    config = write_run(tmp_path, "nemotron", {"tensor": 2})
    for steps in (1, 3):
        assert run_ranks(RANKS, rank_run, str(config), steps) == [steps] * RANKS
    assert (tmp_path / "run" / "checkpoints" / "step_000003").is_dir()
    before, after = load_file(tmp_path / "model" / "model.safetensors"), exported(tmp_path / "run")
    assert after.keys() == before.keys()
    assert all(after[name].shape == before[name].shape for name in before)
    assert all(not torch.equal(after[name], before[name]) for name in before)
