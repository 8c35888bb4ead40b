"""The causes for which a run ends, each with its own exit status. ``docs/exit_statuses.md`` is this table, rendered.

Code that knows why a run cannot go on raises :class:`RunEnded` with a cause. :func:`cause_of` finds the cause of other
errors.
"""

from __future__ import annotations

import enum
import errno
import re
import traceback
from dataclasses import dataclass
from pathlib import Path

_NO_MEMORY = re.compile(
    r"out of memory|(can't|cannot) allocate memory|not enough memory"
    # A library of CUDA that gets no workspace; NOT_INITIALIZED is what it says if it gets none for its handle.
    r"|CU(BLAS|DNN|SOLVER|SPARSE)_STATUS_(ALLOC_FAILED|NOT_INITIALIZED|INTERNAL_ERROR_(HOST|DEVICE)_ALLOCATION_FAILED)",
    re.IGNORECASE,
)
_FULL = re.compile(r"no space left on device|disk quota exceeded", re.IGNORECASE)
_BROKEN = re.compile(
    r"uncorrectable (ECC|NVLink) error|over nvlink or a hardware error|\bXid\b|fallen off the bus|GPU is lost"
    r"|CUDA-capable device\(s\) is/are busy|no CUDA-capable device|system not yet initialized"
    r"|input/output error|stale file handle|\(os error (5|110|113|116)\)",
    re.IGNORECASE,
)
_LOST = re.compile(
    r"connection (was likely )?closed|reset by peer|broken pipe|remote process exit|socket closed|ncclRemoteError"
    r"|ncclSystemError|communicator was aborted|client socket has (timed out|failed)|connectFullMesh failed",
    re.IGNORECASE,
)
_SILENT = re.compile(
    r"timed out waiting \d+ ?ms for|watchdog caught collective operation timeout|wait ?timeout|socket timeout"
    r"|timed out after \d+ ?(ms|seconds waiting for clients)|connect timeout|timed out connecting"
    r"|application timeout caused pair closure",
    re.IGNORECASE,
)
"""Messages of torch 2.13's c10d (``socket.cpp``, ``TCPStore.cpp``, ``ProcessGroupNCCL.cpp``), gloo, NCCL
(``ncclGetErrorString``) and CUDA (``cudaGetErrorString``)."""
_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BROKEN_ERRORS = (
    *(errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ENOTCONN, errno.ESHUTDOWN, errno.ETIMEDOUT, errno.ENXIO),
    *(errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET, errno.ENOLINK),
    *(errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED),
)
"""Errors of a disk, of a file system over a network (Lustre evicts a client with ESHUTDOWN), and of a network."""
_PACKAGE = str(Path(__file__).resolve().parent)


@dataclass(frozen=True)
class Meaning:
    """The meaning of one cause: words for a person, exit status for a scheduler."""

    status: int
    """Exit status of the run's processes."""
    requeue: bool
    """Whether a scheduler should start the same command again without asking anybody."""
    meaning: str
    advice: str
    """Advice to the user; empty where there is nothing to do."""
    restart: bool = False
    """Whether the run may be started again beside its servers, a limited number of times without a new checkpoint."""


class Cause(enum.Enum):
    """Why a run ended. The statuses of ``sysexits.h`` are used where they fit."""

    DONE = Meaning(0, False, "all optimizer steps of run.steps are done", "")
    NOTHING_LEFT = Meaning(
        10,
        False,
        "every prompt that is not too long was graded, and none can be learned from: all are Easy, or Hard "
        "without a teacher's trace",
        "add harder prompts or teachers' traces; if a verifier accepts everything, fix it",
    )
    GROUPS_LOST = Meaning(
        11,
        False,
        "no group of rollouts came back whole, so nothing was graded",
        "read the last reason; check rollout.request_deadline_s, rollout.retries and the servers' logs in run.dir/logs",
    )
    NO_VERDICTS = Meaning(
        12,
        False,
        "the verifier gave no verdict on any rollout of a whole round",
        "fix the verifier that grading.verifier names; `megatron-dypo grade` runs it on a file",
    )
    NOT_FINITE = Meaning(
        13,
        False,
        "gradients or weights were not finite for optimizer.max_bad_steps steps in a row",
        "look at the parameter and the samples that are named, and run `megatron-dypo replay` on the dump; lower "
        "optimizer.lr, or resume from an older checkpoint",
    )
    BAD_INPUT = Meaning(
        65,
        False,
        "a config, a data file, a model folder or another input breaks a rule",
        "correct what the message names",
    )
    SERVERS_GONE = Meaning(
        69,
        False,
        "no SGLang server is left, or none could be reached; or a teacher's servers gave no log-probs in a whole round",
        "read the servers' logs in run.dir/logs, then start the run again: it resumes",
    )
    BUG = Meaning(
        70,
        False,
        "an error of megatron-dypo itself",
        "report it with the traceback and run.dir/config.yaml at the project's issue tracker",
    )
    OUT_OF_MEMORY = Meaning(
        71,
        False,
        "a training process ran out of memory",
        "lower batching.tokens_per_microbatch or split the model further; `megatron-dypo plan` estimates what fits",
    )
    NODE_FAULT = Meaning(
        72,
        False,
        "a GPU, a file system or the network of a node failed",
        "look at the node's kernel log (dmesg); start the run again: it resumes; leave out a node that fails again",
        restart=True,
    )
    IN_USE = Meaning(
        73,
        False,
        "another run uses the same run.dir",
        "wait for it, stop it, or choose another run.dir",
    )
    DISK_FULL = Meaning(
        74,
        False,
        "the file system of the run folder is full or over its quota",
        "make room, then start the run again: it resumes from its last whole checkpoint",
    )
    STOPPED = Meaning(
        75,
        True,
        "the run was asked to stop (SIGUSR1, SIGTERM, SIGINT or SIGHUP) and saved a checkpoint",
        "start the same command again: it goes on from there",
    )
    RANK_HUNG = Meaning(
        76,
        False,
        "a rank did not answer for run.watchdog_s seconds",
        "look at the rank and the operation that are named; start the run again: it resumes",
        restart=True,
    )
    RANK_LOST = Meaning(
        77,
        False,
        "a rank was killed from outside (often by the kernel, for memory) or its node was lost",
        "look at the node's kernel log; start the run again: it resumes",
        restart=True,
    )

    INTERRUPTED = Meaning(
        130,
        False,
        "a second SIGINT (Ctrl-C) ended the run at once",
        "start the same command again: it goes on from the last checkpoint",
    )
    TERMINATED = Meaning(
        143,
        False,
        "a second SIGTERM ended the run at once",
        "start the same command again: it goes on from the last checkpoint",
    )

    @property
    def status(self) -> int:
        return self.value.status

    @property
    def requeue(self) -> bool:
        return self.value.requeue

    @property
    def restart(self) -> bool:
        return self.value.restart

    @property
    def label(self) -> str:
        """The name that people and ``status.json`` see: ``nothing_left``."""
        return self.name.lower()


class RunEnded(Exception):  # noqa: N818 (not every end is an error)
    """The end of a run for ``cause``. The message says in a few lines what was found."""

    def __init__(self, cause: Cause, message: str) -> None:
        super().__init__(cause, message)  # pickling between ranks needs both arguments
        self.cause = cause

    def __str__(self) -> str:
        return str(self.args[1])


def cause_of_status(status: int) -> Cause | None:
    """Return the cause with this exit status, or None."""
    return next((cause for cause in Cause if cause.status == status), None)


def cause_of(error: BaseException) -> Cause:
    """Return the cause of an error that ended a run.

    An exception class may name its cause in an attribute ``cause``. A ValueError that this package raises is a user's
    mistake; a ValueError of a library that the package called is a bug.
    """
    cause = getattr(error, "cause", None)
    if isinstance(cause, Cause):
        return cause
    found = _cause_of_errno(error) if isinstance(error, OSError) else _cause_of_library(error)
    if found:
        return found
    if isinstance(error, ValueError) and _is_raised_here(error):
        return Cause.BAD_INPUT
    return Cause.BUG


def _cause_of_errno(error: OSError) -> Cause | None:
    if error.errno in _FULL_ERRORS:
        return Cause.DISK_FULL
    if error.errno in _BROKEN_ERRORS:
        return Cause.NODE_FAULT
    return Cause.OUT_OF_MEMORY if error.errno == errno.ENOMEM else None


def _cause_of_library(error: BaseException) -> Cause | None:
    """Return the cause that the text of a library's error tells."""
    # By name: this module must not import torch or safetensors.
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"MemoryError", "OutOfMemoryError"}:
        return Cause.OUT_OF_MEMORY
    if not names & {"RuntimeError", "SafetensorError"}:
        return None
    text = str(error)
    # NCCL tells what failed on this node in the same text as that its peers are lost.
    if _NO_MEMORY.search(text):
        return Cause.OUT_OF_MEMORY
    if _BROKEN.search(text):
        return Cause.NODE_FAULT
    # When one rank has gone or does not answer, gloo, NCCL and torch's store raise these on the other ranks.
    if _LOST.search(text):
        return Cause.RANK_LOST
    if _SILENT.search(text):
        return Cause.RANK_HUNG
    return Cause.DISK_FULL if _FULL.search(text) else None


def _is_raised_here(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.startswith(_PACKAGE)
