"""The time of forward and backward of each rank, without its wait for other replicas."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tests.support.dist.multi_step import batch_of, config_of, make_run, put
from tests.support.dist.spawn import run_ranks
from tests.support.hf_models import make_hf_model

EXTRA_S = 1.0


def rank_update(path: str, folder: str) -> dict[str, Any]:
    """Make two updates of two replicas. The second replica's forward passes wait until the first one has reduced."""
    from megatron_dypo.config.model import ParallelConfig
    from megatron_dypo.mcore.chunks import unwrap
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.parallel.groups import close
    from tests.support.loop_cases import make_step

    layout = start_megatron(ParallelConfig())
    run, recorder, policy = make_run(config_of(path, folder, {}, "exact"), layout)
    put(run, batch_of(0))
    config, has_reduced = unwrap(policy.chunks[0]).config, Path(folder) / "reduced"
    finalize: Any = config.finalize_model_grads_func
    make_step(run)

    def noted(*args: Any, **kwargs: Any) -> None:
        if layout.dp_rank == 0:
            has_reduced.touch()
        finalize(*args, **kwargs)

    def hold(module: Any, inputs: Any) -> None:
        if layout.dp_rank == 1 and module.training and not held:
            held.append(True)
            deadline = time.monotonic() + 120
            while not has_reduced.exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            end = time.monotonic() + EXTRA_S
            while time.monotonic() < end:
                pass

    held: list[bool] = []
    config.finalize_model_grads_func = noted
    handle = policy.chunks[0].register_forward_pre_hook(hold)
    Path(folder).mkdir(parents=True, exist_ok=True)
    make_step(run)
    handle.remove()
    close(layout)
    return {"metrics": recorder.metrics, "held": bool(held)}


def test_the_rank_that_others_wait_for_is_the_slowest(tmp_path: Path) -> None:
    path = str(make_hf_model("qwen2", tmp_path / "hf"))
    first, second = run_ranks(2, rank_update, path, str(tmp_path / "run"))
    assert (first["held"], second["held"]) == (False, True)
    metrics = first["metrics"][2]
    assert metrics["perf/slowest_rank"] == 1.0
    assert metrics["perf/slowest_rank_excess"] > 0
    assert 0 < metrics["perf/rank_wait_ratio"] < 0.5, "of two ranks, one waits for less than the whole time"
