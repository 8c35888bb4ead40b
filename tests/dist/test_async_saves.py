"""Checkpoints that are written while training goes on: at most one, and the one before counts until it is published."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest

from tests.support.dist.spawn import run_ranks
from tests.support.dist.training import start
from tests.support.hf_models import make_hf_model


def rank_save(path: str, root: str, axes: dict[str, Any], full: tuple[int, ...]) -> dict[str, Any]:
    """Save step 1, begin steps 2 and 3 without waiting, fail to write step 4, and save step 5.

    Args:
        full: ranks whose file system is full at step 4.
    """
    import torch.distributed as dist

    from megatron_dypo.config.model import ParallelConfig
    from megatron_dypo.config.run import CheckpointConfig
    from megatron_dypo.mcore.checkpoints import checkpoint
    from megatron_dypo.mcore.checkpoints.saving import PendingSave, Saver
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.parallel.groups import close

    parallel = ParallelConfig(**axes)
    layout = start_megatron(parallel)
    session = start(path, layout, parallel, distributed=True)
    saver, found = Saver(), dict[str, Any]()

    def begin(step: int) -> PendingSave:
        state = {"chunks": session.chunks, "optimizer": session.optimizer, "layout": layout}
        return checkpoint.begin_save(root, step, **state, trainer_state={}, cfg=CheckpointConfig(keep=2))

    def folders() -> list[str]:
        dist.barrier()
        names = sorted(path.name for path in Path(root).glob("step_*"))
        dist.barrier()  # before a rank goes on and changes them
        return names

    session.train(1, 1)
    saver.begin(lambda: begin(1), waits=True)
    found["waited"] = folders()
    saver.begin(lambda: begin(2), waits=False)
    session.train(2, 2)
    found["begun"] = folders()
    saver.begin(lambda: begin(3), waits=False)
    found["next"] = folders()
    saver.finish()
    saver.finish()  # nothing is pending
    saver.poll()
    found["finished"] = folders()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if layout.rank in full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    try:
        saver.begin(lambda: begin(4), waits=False)
        session.train(3, 3)
        saver.finish()
    except OSError as error:
        found["error"] = str(error)
    except RuntimeError as error:
        found["error"] = f"on another rank: {error}"
    found["failed"] = folders()
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    saver.begin(lambda: begin(5), waits=True)
    found["again"] = folders()
    close(layout)
    return found


@pytest.mark.parametrize(
    ("axes", "full"),
    [({}, (0, 1)), ({"pipeline": 2}, (0,)), ({"pipeline": 2}, (1,))],
    ids=["every rank", "the first rank", "another rank"],
)
def test_a_save_in_the_background_is_published_by_the_next_one_or_the_end_and_a_failed_one_leaves_nothing(
    tmp_path: Path, axes: dict[str, Any], full: tuple[int, ...]
) -> None:
    path = str(make_hf_model("qwen2", tmp_path / "hf"))
    results = run_ranks(2, rank_save, path, str(tmp_path / "checkpoints"), axes, full)
    for found in results:
        assert found["waited"] == ["step_000001"]
        assert found["begun"] == ["step_000001", "step_000002.tmp"]
        assert found["next"] == ["step_000001", "step_000002", "step_000003.tmp"]
        assert found["finished"] == found["failed"] == ["step_000002", "step_000003"]
        assert found["again"] == ["step_000003", "step_000005"], "a later save finds room again"
    assert any("the file system took no more" in found["error"] for found in results)
    assert all(found["error"] for found in results)
