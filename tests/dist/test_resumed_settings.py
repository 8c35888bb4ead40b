"""A checkpoint restores moments and weights, but no settings: those come from the config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.dist.spawn import run_ranks
from tests.support.dist.training import start
from tests.support.hf_models import make_hf_model

OLD: dict[str, Any] = {"lr": 1e-3, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.1}
NEW: dict[str, Any] = {
    "lr": 1e-9, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0, "beta1": 0.5, "beta2": 0.9, "eps": 1e-3,
}  # fmt: skip


def rank_resume(path: str, root: str, options: dict[str, Any]) -> dict[str, Any]:
    from megatron_dypo.config.model import ParallelConfig
    from megatron_dypo.mcore.checkpoints import checkpoint
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.parallel.groups import close

    parallel = ParallelConfig()
    layout = start_megatron(parallel)
    session = start(path, layout, parallel, **OLD, **options)
    session.train(1, 2)
    saved = session.weights()
    folder = checkpoint.begin_save(
        root, 2, chunks=session.chunks, optimizer=session.optimizer, layout=layout, trainer_state={}
    ).finish()
    again = start(path, layout, parallel, **NEW, **options)
    fresh = [_settings(group) for group in again.optimizer.megatron.param_groups]
    checkpoint.load(folder, chunks=again.chunks, optimizer=again.optimizer, layout=layout)
    loaded = [_settings(group) for group in again.optimizer.megatron.param_groups]
    steps = again.train(3, 3)
    rates = {group["lr"] for group in again.optimizer.megatron.param_groups}
    close(layout)
    return {
        "saved": saved,
        "weights": again.weights(),
        "fresh": fresh,
        "loaded": loaded,
        "steps": steps,
        "rates": rates,
    }


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "step")}


@pytest.mark.parametrize("options", [{}, {"distributed": True}], ids=["plain", "distributed"])
def test_a_resumed_optimizer_has_the_settings_of_the_config(tmp_path: Path, options: dict[str, Any]) -> None:
    path = str(make_hf_model("qwen2", tmp_path / "hf"))
    (result,) = run_ranks(1, rank_resume, path, str(tmp_path / "checkpoints"), options)
    assert result["loaded"] == result["fresh"]
    assert {group["betas"] for group in result["loaded"]} == {(0.5, 0.9)}
    assert result["rates"] == {1e-9} == {rate for _, rate in result["steps"]}, "what is reported is what was applied"
    for name, tensor in result["weights"].items():
        np.testing.assert_allclose(tensor, result["saved"][name], atol=1e-7, rtol=0, err_msg=name)
