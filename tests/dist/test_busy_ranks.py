"""The time of forward and backward of each rank, without its wait for other replicas."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from megatron_dypo.loop.books.slow_ranks import NEEDED, SLOW_FACTOR, WINDOW
from tests.support.dist.multi_step import batch_of, config_of, make_run, put
from tests.support.dist.spawn import run_ranks
from tests.support.hf_models import make_hf_model

EXTRA_S = 1.0
STEPS, SLOW_S = WINDOW, 0.5
"""Steps of a run with a slow rank, and the time that it takes longer in each."""


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


def rank_be_slow(path: str, folder: str) -> dict[str, Any]:
    """Make updates of two replicas, the second of which sleeps in each; return the metrics and the lines of the log."""
    from megatron_dypo.config.model import ParallelConfig
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.parallel.groups import close
    from tests.support.loop_cases import make_step

    layout = start_megatron(ParallelConfig())
    run, recorder, policy = make_run(config_of(path, folder, {}, "exact"), layout)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_dypo").addHandler(handler)

    def sleep(module: Any, inputs: Any) -> None:
        if layout.dp_rank == 1 and module.training:
            time.sleep(SLOW_S)

    policy.chunks[0].register_forward_pre_hook(sleep)
    for step in range(STEPS):
        if run.progress.batch.is_used_up:
            put(run, batch_of(step // 2))
        make_step(run)
    close(layout)
    return {"metrics": recorder.metrics, "lines": [line for line in lines if line.startswith("slow: ")]}


def test_the_rank_that_others_wait_for_is_the_slowest(tmp_path: Path) -> None:
    path = str(make_hf_model("qwen2", tmp_path / "hf"))
    first, second = run_ranks(2, rank_update, path, str(tmp_path / "run"))
    assert (first["held"], second["held"]) == (False, True)
    metrics = first["metrics"][2]
    assert metrics["perf/slowest_rank"] == 1.0
    assert metrics["perf/slowest_rank_excess"] > 0
    assert 0 < metrics["perf/rank_wait_ratio"] < 0.5, "of two ranks, one waits for less than the whole time"


def test_a_rank_that_is_slow_in_each_step_is_named_by_the_metrics_and_the_log(tmp_path: Path) -> None:
    path = str(make_hf_model("qwen2", tmp_path / "hf"))
    first, second = run_ranks(2, rank_be_slow, path, str(tmp_path / "run"))
    slow = [metrics for metrics in first["metrics"].values() if metrics["perf/slowest_rank"] == 1.0]
    assert len(slow) >= NEEDED, "on a busy machine another rank may be slower now and then"
    assert max(metrics["perf/rank_wait_ratio"] for metrics in slow) > 0.1
    (line,) = first["lines"]
    assert (
        f": rank 1 took over {SLOW_FACTOR:g} times as long as the median rank for the same work in {NEEDED} of " in line
    )
    assert second["lines"] == [], "the first rank warns"
