"""The end of a run after a save that failed."""

import errno
import traceback
from pathlib import Path

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dypo.ending import Cause, cause_of
from megatron_dypo.mcore.checkpoints.save_failure import save_failure

REASONS = [
    (OSError(errno.ENOSPC, "No space left on device"), Cause.DISK_FULL),
    (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), Cause.DISK_FULL),
    (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), Cause.DISK_FULL),
    (RuntimeError("Worker failure: [Errno 122] Disk quota exceeded"), Cause.DISK_FULL),
    (OSError(errno.EIO, "Input/output error"), Cause.NODE_FAULT),
    (RuntimeError("unknown"), Cause.BUG),
]


@pytest.mark.parametrize(("reason", "cause"), REASONS, ids=lambda value: str(value)[:50])
def test_the_first_rank_says_what_its_writers_failed_of(reason, cause):
    error = save_failure(CheckpointException("write", {3: (reason, traceback.StackSummary())}), Path("step_000010"))
    assert cause_of(error) is cause
    assert "rank 3 could not write its part of the checkpoint" in str(error)
    assert "step_000010" in str(error)


def test_another_rank_lets_the_first_speak():
    assert cause_of(save_failure(CheckpointException("write", {}), Path("step_000010"))) is Cause.RANK_LOST
