"""Turns Megatron's and torch's exceptions of a failed checkpoint into errors that the end of a run can sort."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from megatron_dypo.ending import Cause

_UNWRITTEN = re.compile(r"unexpected pos|failed writing|No space left|File too large|quota exceeded")
"""What torch's writer says where a file took no more; the operating system's number is lost on the way."""


class SaveFailedError(RuntimeError):
    """A checkpoint was not written, for a reason that the first rank has."""

    cause = Cause.RANK_LOST


def save_failure(error: CheckpointException, final: Path) -> Exception:
    """What Megatron's writers failed of, as one error. The exception is raised on all ranks; the first has reasons."""
    if not error.failures:
        return SaveFailedError(f"{final}: not written; rank 0 has the reason")
    rank, (reason, _) = next(iter(error.failures.items()))
    text = f"rank {rank} could not write its part of the checkpoint: {reason}"
    if isinstance(reason, OSError):
        return OSError(reason.errno, text, str(final))
    if _UNWRITTEN.search(str(reason)):
        return OSError(errno.ENOSPC, f"{text} (the file system took no more: full, a quota, or ulimit -f)", str(final))
    return RuntimeError(f"{final}: {text}")
