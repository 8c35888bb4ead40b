"""Checkpoints that are written while training goes on: at most one, and the one before counts until it is published."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

from tests.support.dist.spawn import run_ranks
from tests.support.dist.training import start
from tests.support.hf_models import make_hf_model


def rank_save(path: str, root: str, max_file_bytes: int) -> dict[str, Any]:
    """Save step 1, begin step 2 and step 3 without waiting, and fail to write step 4 on a file system that is full."""
    import torch.distributed as dist

    from megatron_dypo.config.model import ParallelConfig
    from megatron_dypo.config.run import CheckpointConfig
    from megatron_dypo.mcore.checkpoints import checkpoint
    from megatron_dypo.mcore.checkpoints.saving import PendingSave, Saver
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.parallel.groups import close

    parallel = ParallelConfig()
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
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, resource.RLIM_INFINITY))
    try:
        saver.begin(lambda: begin(4), waits=False)
        session.train(3, 3)
        saver.finish()
    except OSError as error:
        found["error"] = str(error)
    except RuntimeError as error:
        found["error"] = f"on another rank: {error}"
    found["failed"] = folders()
    close(layout)
    return found


def test_a_save_in_the_background_is_published_by_the_next_one_or_the_end_and_a_failed_one_leaves_nothing(
    tmp_path: Path,
) -> None:
    path = str(make_hf_model("qwen2", tmp_path / "hf"))
    results = run_ranks(2, rank_save, path, str(tmp_path / "checkpoints"), 20_000)
    for found in results:
        assert found["waited"] == ["step_000001"]
        assert found["begun"] == ["step_000001", "step_000002.tmp"]
        assert found["next"] == ["step_000001", "step_000002", "step_000003.tmp"]
        assert found["finished"] == found["failed"] == ["step_000002", "step_000003"]
    assert "the file system took no more" in results[0]["error"]
    assert results[1]["error"]
