"""Turns Megatron's and torch's exceptions of a failed save into errors for which the cause of the end is known."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from megatron_dypo.ending import Cause

_UNWRITTEN = re.compile(r"unexpected pos|failed writing|No space left|File too large|quota exceeded")
"""Messages of torch's writer for a full file system. It does not pass on the error number."""


class SaveFailedError(RuntimeError):
    """A checkpoint was not written. Only the first rank knows the reason."""

    cause = Cause.RANK_LOST


def save_failure(error: CheckpointException, final: Path) -> Exception:
    """Return one error that tells why Megatron's writers failed. Only on the first rank ``error`` has the reasons."""
    if not error.failures:
        return SaveFailedError(f"{final}: not written; rank 0 has the reason")
    rank, (reason, _) = next(iter(error.failures.items()))
    text = f"rank {rank} could not write its part of the checkpoint: {reason}"
    if isinstance(reason, OSError):
        return OSError(reason.errno, text, str(final))
    if _UNWRITTEN.search(str(reason)):
        return OSError(errno.ENOSPC, f"{text} (the file system took no more: full, a quota, or ulimit -f)", str(final))
    return RuntimeError(f"{final}: {text}")
