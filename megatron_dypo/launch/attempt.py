"""One rank of one start of a run, from its first line to its exit status. Every rank ends here."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path

from megatron_dypo.config.tree import Config
from megatron_dypo.ending import Cause, RunEnded, cause_of
from megatron_dypo.launch.run_folder import make_run_folder
from megatron_dypo.launch.run_lock import RunLock
from megatron_dypo.mcore.checkpoints.folder import mend_interrupted
from megatron_dypo.metrics import status
from megatron_dypo.metrics.logs import append_line, flush_repeated, set_up_logging, write_crashes
from megatron_dypo.metrics.status import ATTEMPT_VARIABLE, Record, RunStatus
from megatron_dypo.processes import stop_requests, watchdog
from megatron_dypo.processes.children import signal_at_parents_end

LAUNCHER_VARIABLE = "MEGATRON_DYPO_LAUNCHER"
"""Environment variable of a rank: the process number of its launcher. torchrun itself does not set it."""
VICTIM_WAIT_S = 15.0
"""Longest wait of a rank that lost its connections for the rank that caused it to report why."""
_LEADER_WAIT_S = 60.0
"""Longest wait for the first rank, which closes the servers, when a run ends on all ranks together."""
_LOOK_EVERY_S = 0.1
"""Seconds between two looks at a file of the run folder, since a shared file system does not notify of changes."""
_EXIT_WAIT_S = 30.0
"""Longest delay of the exit by threads that nobody joins."""

log = logging.getLogger(__name__)


def run_rank(config: Config, work: Callable[[Config], None]) -> int:
    """Do the work of one rank, and return the exit status of its :class:`~megatron_dypo.ending.Cause`.

    Args:
        work: the loop. If it ends before its last step, it raises :class:`RunEnded`.
    """
    if "RANK" in os.environ:
        # A rank must not train on unnoticed after its torchrun was killed.
        signal_at_parents_end(signal.SIGTERM, int(os.environ.get(LAUNCHER_VARIABLE, os.getppid())))
    attempt = Attempt(Path(config.run.dir), watchdog_s=config.run.watchdog_s)
    try:
        attempt.begin()
        with status.current(attempt.status):
            work(config)
    except BaseException as error:  # noqa: BLE001 (every end of a rank passes here, and is told)
        return attempt.end(error)
    return attempt.end(RunEnded(Cause.DONE, f"run folder {config.run.dir}"))


class Attempt:
    """One rank's part in one start of a run: the lock (on the first rank), the status, signals, the watchdog."""

    def __init__(self, run_dir: Path, *, watchdog_s: float) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.status = RunStatus(run_dir, _attempt_name(), self.rank)
        self._run_dir = run_dir
        self._watchdog_s = watchdog_s
        self._lock: RunLock | None = None
        self._lock_of_leader = run_dir / "run.lock"

    def begin(self) -> None:
        """Lock the run folder, listen to signals, start the log and the watchdog.

        Raises:
            RunEnded: another run uses the folder.
            ValueError: the folder cannot be used.
        """
        if self.rank == 0:
            make_run_folder(self._run_dir)
            lock = RunLock(self._run_dir, on_loss=lambda message: self.leave(Cause.IN_USE, message))
            lock.acquire()
            self._lock = lock  # set only once the lock is held: before, this run must not write to the folder
            self.status.open()
        stop_requests.listen(self._answers())
        set_up_logging(self._run_dir)
        write_crashes(self._run_dir, self.rank)
        if self.rank == 0:
            mend_interrupted(self._run_dir / "checkpoints")
        watchdog.start(self._run_dir, self.status, patience_s=self._watchdog_s, leave=self.leave)

    def end(self, error: BaseException) -> int:
        """Report why this rank ends, unless another rank has done so; return the exit status."""
        watchdog.finish()
        cause, message = cause_of(error), _message(error)
        if self.rank == 0 and self._lock is None:
            print(_terminal_text(Record(message=message, rank=0), cause, error), file=sys.stderr)
            return _exit_soon(cause.status)
        if cause is Cause.DONE and self.rank != 0:
            return _exit_soon(cause.status)
        if cause is Cause.RANK_LOST:
            self._wait_for(lambda: self.status.ended() is not None, VICTIM_WAIT_S)
        elif isinstance(error, RunEnded) and self.rank != 0:
            # All ranks end together. torchrun stops all ranks when one fails, so wait until the first rank has closed
            # the servers and removed its lock.
            self._wait_for(lambda: not self._lock_of_leader.exists(), _LEADER_WAIT_S)
        found = self._tell(cause, message, error)
        self._release()
        return _exit_soon(found)

    def leave(self, cause: Cause, message: str, before_exit: Callable[[], None] = lambda: None) -> None:
        """End this process at once, from any thread; report why, unless another rank has done so."""
        found = self._tell(cause, message, None)
        before_exit()
        self._release()
        _flush()
        os._exit(found)

    def _tell(self, cause: Cause, message: str, error: BaseException | None) -> int:
        """Write the end to status file, log and terminal if no rank has ended before; return the exit status."""
        try:
            record = self.status.end(cause, message)
            first = self.status.ended()
        except OSError as reason:
            print(f"megatron-dypo: {self._run_dir / status.NAME} cannot be written: {reason}", file=sys.stderr)
            record = first = None
            cause = cause_of(reason) if cause is Cause.DONE else cause
        if record is None and first is not None and first.status:
            self._note_consequence(error, first)
            return first.status
        record = record or Record(message=message, rank=self.rank)
        print(_terminal_text(record, cause, error), file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):  # a full disk: the message is on the terminal
            append_line(self._run_dir, 0, f"ended: {last_line(record, cause)}")
            if error is not None and cause is Cause.BUG:
                append_line(self._run_dir, self.rank, "".join(traceback.format_exception(error)))
        return cause.status

    def _note_consequence(self, error: BaseException | None, first: Record) -> None:
        """Write an error that followed from another rank's end only to this rank's own log."""
        if error is None or first.cause == cause_of(error).label:
            return
        with contextlib.suppress(OSError):
            text = "".join(traceback.format_exception(error))
            append_line(self._run_dir, self.rank, f"after the run had ended ({first.cause}, rank {first.rank}): {text}")

    def _release(self) -> None:
        if self._lock is not None:
            with contextlib.suppress(OSError):  # if the lock stays, the next start finds that this process is gone
                self._lock.release()

    def _answers(self) -> stop_requests.Answers:
        is_launched = ATTEMPT_VARIABLE in os.environ  # then the launcher reports to the user and ends the ranks

        def on_request(number: signal.Signals) -> None:
            if not is_launched and self.rank == 0:
                log.warning(stop_requests.FIRST_ANSWER, number.name)

        def on_early_request(number: signal.Signals) -> None:
            self.leave(Cause.STOPPED, f"stopped on request ({number.name}) {status.BEFORE_FIRST_STEP}")

        def on_insistence(number: signal.Signals) -> None:
            if not is_launched:
                self.leave(*stop_requests.end_of_insistence(number))

        def on_parent() -> None:
            if os.getppid() == parent:  # torchrun ends this rank, because another one failed or by request
                self._release()
                _flush()
                os._exit(Cause.TERMINATED.status)
            self.leave(Cause.RANK_LOST, f"the launcher of rank {self.rank} (process {parent}) was killed")

        parent = os.getppid()
        return stop_requests.Answers(
            on_request=on_request,
            on_early_request=on_early_request,
            on_insistence=on_insistence,
            on_parent=on_parent if "RANK" in os.environ else None,
        )

    def _wait_for(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY_S)


def last_line(record: Record, cause: Cause) -> str:
    """Return cause, counts and advice as one line of the log."""
    parts = [record.message, record.progress(), cause.value.advice]
    return f"{cause.label} (status {cause.status}): " + "; ".join(part for part in parts if part)


def terminal_line(record: Record, cause: Cause) -> str:
    """Return the end of a run for the user. For a user's mistake it is only the text of the error."""
    if cause is Cause.BAD_INPUT:
        return f"megatron-dypo: error: {record.message}"
    kind = "" if cause in (Cause.DONE, Cause.STOPPED) else "error: "
    return f"megatron-dypo: {kind}{last_line(record, cause)}"


def _terminal_text(record: Record, cause: Cause, error: BaseException | None) -> str:
    trace = "".join(traceback.format_exception(error)) if error is not None and cause is Cause.BUG else ""
    return trace + terminal_line(record, cause)


def end_of(error: BaseException) -> int:
    """Report the end of a process that is not (yet) a rank of a run; return the exit status."""
    cause = cause_of(error)
    is_said_elsewhere = cause is Cause.BAD_INPUT and os.environ.get("LOCAL_RANK", "0") != "0"
    if not is_said_elsewhere:  # the ranks of a node read the same files
        record = Record(message=_message(error))
        print(_terminal_text(record, cause, error), file=sys.stderr, flush=True)
    return cause.status


def _message(error: BaseException) -> str:
    return f"sys.exit({error})" if isinstance(error, SystemExit) else str(error) or type(error).__name__


def stop_before_start() -> None:
    """From now on, end this process on the first request to stop. It only reads inputs, and nothing has begun."""

    def leave(number: signal.Signals) -> None:
        record = Record(message=f"stopped on request ({number.name}) before anything was started")
        print(terminal_line(record, Cause.STOPPED), file=sys.stderr, flush=True)
        os._exit(Cause.STOPPED.status)

    answers = stop_requests.Answers(on_request=leave, on_early_request=leave, on_insistence=leave)
    stop_requests.listen(answers)


def _attempt_name() -> str:
    """Return a name that all ranks of this start share and no other start has at the same time."""
    if "RANK" not in os.environ:
        return uuid.uuid4().hex
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return os.environ.get(ATTEMPT_VARIABLE) or f"{address}/{os.environ.get('TORCHELASTIC_RUN_ID')}"


def _exit_soon(exit_status: int) -> int:
    """Return the status. End the process with it even if a thread that nobody joins would keep it alive."""
    _flush()
    timer = threading.Timer(_EXIT_WAIT_S, lambda: os._exit(exit_status))
    timer.daemon = True
    timer.start()
    return exit_status


def _flush() -> None:
    flush_repeated()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or a broken pipe
            stream.flush()
