"""torchrun for the ranks of a run. It passes on requests to stop, and its exit status tells why the run ended.

``python -m megatron_dypo.launch.torchrun ARGUMENTS -m megatron_dypo.cli train CONFIG …`` takes torchrun's arguments;
``probe RUN`` in place of ``train CONFIG`` works in the same way.
Plain torchrun dies of signals that are meant for the ranks, always ends with status 1 if a rank fails, and prints its
own traceback below that of the rank. On each node this process reads config and inputs before it starts ranks, so that
a mistake there is reported once.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import platform
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dypo.ending import Cause, cause_of
from megatron_dypo.fs import set_access
from megatron_dypo.launch.attempt import LAUNCHER_VARIABLE, end_of, last_line, stop_before_start, terminal_line
from megatron_dypo.launch.run_folder import make_run_folder
from megatron_dypo.launch.run_lock import remove_dead, require_free
from megatron_dypo.metrics.logs import append_line
from megatron_dypo.metrics.status import ATTEMPT_VARIABLE, Record, RunStatus
from megatron_dypo.metrics.terminal import survive_terminal
from megatron_dypo.processes import stop_requests

if TYPE_CHECKING:
    from megatron_dypo.config.tree import Config
    from megatron_dypo.launch.rendezvous import Meeting

_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
_AGAIN_S = 2.0
"""Seconds after which a request is sent again, since torchrun does not announce that it has started a rank."""
END_FILE_VARIABLE = "MEGATRON_DYPO_END_FILE"
"""Environment variable: a file that gets one line on how the run ended, ``STATUS STEPS CAUSE: MESSAGE``; slurm/node.sh
sets it. STEPS counts the steps of this start; it is ``?`` if the loop did not report them."""


def main() -> int:
    """Check the inputs, start this node's ranks, wait for them, and return the exit status."""
    survive_terminal()
    stop_requests.hold_requests()
    stop_before_start()
    try:
        config = _checked_config(sys.argv[1:])
        from megatron_dypo.launch.rendezvous import read_meeting  # imports torch, for which a mistake should not wait

        meeting = read_meeting(sys.argv[1:])
        launcher = _prepare(config, meeting)
    except SystemExit:  # torchrun's own arguments
        raise
    except BaseException as error:  # noqa: BLE001 (every end of the launcher passes here, and is told)
        status = end_of(error)
        _write_end_file(status, None, f"{cause_of(error).label}: {error}")
        return status
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    stop_requests.listen(launcher.answers())
    return launcher.run(meeting.arguments)


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """The launcher of one node's ranks."""

    status: RunStatus | None
    """Status file of the attempt; None if the ranks do something other than train or
    probe."""
    run_dir: Path | None
    has_first_rank: bool = False
    """Whether this launcher certainly starts rank 0 of the run."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Start the ranks by torchrun's ``arguments`` and wait for them; return the exit status."""
        from torch.distributed import run
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        # The rank that failed first, or conclude(), reports the failure; torchrun's own report would repeat it.
        for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.")]:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            run.run(arguments)
        except ChildFailedError as error:
            return self.conclude({rank: failure.exitcode for rank, failure in error.failures.items()})
        except SystemExit:  # its own arguments
            raise
        except Exception as error:  # noqa: BLE001 (torchrun's own failure, such as a port that is taken: told)
            return self._tell(Cause.RANK_LOST, f"torchrun could not bring the ranks together: {_one_line(error)}")
        ended = self.status.ended() if self.status else None
        if ended is not None and ended.status:
            return self.conclude({})  # the ranks of another node
        if self.has_first_rank and ended is None:
            return self._tell(Cause.BUG, "all ranks ended with 0, and none said that the run is done")
        return self._end_with(Cause.DONE.status, "done")

    def conclude(self, statuses: Mapping[int, int]) -> int:
        """Return the exit status of a run whose ranks ended with ``statuses``, in the order in which they failed."""
        ended = self.status.ended() if self.status else None
        if self.status and ended is not None and ended.status is not None:
            self.status.settle()
            text = f"{ended.cause}: {ended.who()} on {ended.host}: {ended.message}"
            if ended.host != platform.node():
                print(f"megatron-dypo: the run has ended: {text}", file=sys.stderr, flush=True)
            return self._end_with(ended.status, text)
        victims = (-signal.SIGTERM, Cause.TERMINATED.status)
        rank, code = next(((r, c) for r, c in statuses.items() if c not in victims), next(iter(statuses.items())))
        if code >= 0:
            # The status of a cause: the rank has reported it, but could not write to run.dir.
            has_told = code not in (0, 1, 2)
            return self._end_with(code, "") if has_told else self._tell(Cause.BUG, f"rank {rank} ended with {code}")
        number = signal.Signals(-code)
        if number in _CRASHES:
            return self._tell(Cause.BUG, f"rank {rank} crashed ({number.name}); see its log in run.dir/logs")
        return self._tell(Cause.RANK_LOST, f"rank {rank} was killed by {number.name}")

    def answers(self) -> stop_requests.Answers:
        """Return the answers to signals, which pass them on to the ranks."""

        def on_request(number: signal.Signals) -> None:
            print(f"megatron-dypo: {stop_requests.FIRST_ANSWER % number.name}", file=sys.stderr, flush=True)
            threading.Thread(target=_pass_on, name="requests", daemon=True).start()

        def on_insistence(number: signal.Signals) -> None:
            cause, message = stop_requests.end_of_insistence(number)
            status = self._tell(cause, message)
            _end_ranks()
            if self.run_dir is not None:
                remove_dead(self.run_dir)
            os._exit(status)

        return stop_requests.Answers(on_request=on_request, on_early_request=_ignore, on_insistence=on_insistence)

    def _tell(self, cause: Cause, message: str) -> int:
        """Report how the run ended in place of a rank that could not; return the exit status."""
        record = None
        try:
            record = self.status.end(cause, message) if self.status else None
            if self.run_dir is not None and record is not None:
                append_line(self.run_dir, 0, f"ended: {last_line(record, cause)}")
                remove_dead(self.run_dir)
        except OSError as error:
            print(f"megatron-dypo: {self.run_dir} cannot be written to: {error}", file=sys.stderr)
        print(terminal_line(record or Record(message=message), cause), file=sys.stderr, flush=True)
        return self._end_with(cause.status, f"{cause.label}: {message}")

    def _end_with(self, status: int, text: str) -> int:
        record = self.status.read() if self.status else None
        _write_end_file(status, record, text)
        return status


def _checked_config(arguments: Sequence[str]) -> Config | None:
    """Read the command that the ranks will run, and check its config and inputs; return None for another program.

    Raises:
        ValueError: the config or one of its inputs breaks a rule.
    """
    command = run_command(arguments)
    if command is None:
        return None
    from megatron_dypo.config.reading.load import load_config
    from megatron_dypo.config.smoke import smoke_config
    from megatron_dypo.launch.probe_target import probe_target
    from megatron_dypo.launch.start import CHECKED_VARIABLE, check_inputs

    name, subject, *overrides = command
    if name == "train":
        config = smoke_config(load_config(Path(subject), overrides))
    else:
        config = probe_target(Path(subject), initial="--initial" in arguments).config(overrides)
    set_access(shared=config.run.shared_files)  # ranks inherit it
    if CHECKED_VARIABLE not in os.environ and (notes := check_inputs(config)):
        raise ValueError("\n".join(notes))
    return config


def _prepare(config: Config | None, meeting: Meeting) -> Launcher:
    """Make the run folder, and name this start of the run. Raises RunEnded if another run uses the folder."""
    if config is None:
        return Launcher(status=None, run_dir=None)
    run_dir = Path(config.run.dir)
    if meeting.has_first_rank:
        require_free(make_run_folder(run_dir))
    os.environ[ATTEMPT_VARIABLE] = meeting.attempt
    status = RunStatus(run_dir, meeting.attempt, rank=-1)
    return Launcher(status=status, run_dir=run_dir, has_first_rank=meeting.has_first_rank)


def run_command(arguments: Sequence[str]) -> list[str] | None:
    """Return the words of a ``train`` or ``probe`` command without its options; None for another program."""
    words = list(arguments)
    for index, word in enumerate(words):
        if word == "megatron_dypo.cli" and words[index + 1 : index + 2] in (["train"], ["probe"]):
            found = [w for w in words[index + 1 :] if not w.startswith("--")]
            return found if len(found) > 1 else None
    return None


def _pass_on() -> None:
    """Send the ranks SIGUSR1 until they have ended."""
    pause = threading.Event()
    while True:
        for rank in _ranks():
            _send(rank, signal.SIGUSR1)
        pause.wait(_AGAIN_S)


def _end_ranks() -> None:
    import psutil

    ranks = [psutil.Process(pid) for pid in _ranks()]
    for rank in ranks:
        _send(rank.pid, signal.SIGTERM)
    _, alive = psutil.wait_procs(ranks, timeout=1.0)
    for rank in alive:
        _send(rank.pid, signal.SIGKILL)


def _ranks() -> list[int]:
    """Return the process ids of the ranks. torchrun starts no other processes."""
    import psutil

    return [child.pid for child in psutil.Process().children()]


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _ignore(_: signal.Signals) -> None:
    pass


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _write_end_file(status: int, record: Record | None, text: str) -> None:
    path = os.environ.get(END_FILE_VARIABLE)
    if path:
        steps = "?" if record is None or record.steps_here() is None else record.steps_here()
        Path(path).write_text(f"{status} {steps} {text}".replace("\n", "; ").rstrip() + "\n")


if __name__ == "__main__":
    sys.exit(main())
