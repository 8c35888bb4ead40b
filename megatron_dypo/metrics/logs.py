"""Log lines: every rank logs to the run folder, and the global leader also to the terminal."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path

from megatron_dypo.metrics.repeats import flush_repeated as flush_repeated
from megatron_dypo.metrics.repeats import warn_often as warn_often

_FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"
_DATE = "%Y-%m-%d %H:%M:%S%z"  # a run passes midnight, and its nodes may be in several zones


def set_up_logging(run_dir: str | Path) -> None:
    """Append this rank's lines to ``<run_dir>/logs/rank_00000.log``; the first rank also writes to stderr.

    Progress bars use that stream too, so lines go through tqdm, which redraws the bar below them.
    """
    rank = int(os.environ.get("RANK", "0"))
    handlers: list[logging.Handler] = [_RankFile(log_path(run_dir, rank))]
    if rank == 0:
        handlers.append(_TerminalHandler())
    _log_to(handlers)


def log_path(run_dir: str | Path, rank: int) -> Path:
    """Return the log file of a rank."""
    return Path(run_dir) / "logs" / f"rank_{rank:05d}.log"


def write_crashes(run_dir: str | Path, rank: int) -> None:
    """Make a crash of the interpreter (a segmentation fault, an abort) write the stacks to the rank's log."""
    path = log_path(run_dir, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    faulthandler.enable(path.open("a", encoding="utf-8"))  # open for as long as the process lives


def append_line(run_dir: str | Path, rank: int, text: str, *, level: int = logging.INFO) -> None:
    """Append a line to a rank's log from any process of the run, without handlers. Raises OSError."""
    record = logging.LogRecord("megatron_dypo", level, "", 0, text.rstrip("\n"), None, None)
    with log_path(run_dir, rank).open("a", encoding="utf-8") as file:
        file.write(_formatter().format(record) + "\n")


def write_stacks(run_dir: str | Path, rank: int, why: str) -> None:
    """Append the stacks of all threads of this process to a rank's log, if the disk takes them."""
    with contextlib.suppress(OSError), log_path(run_dir, rank).open("a", encoding="utf-8") as file:
        file.write(f"{why}; the stacks of this rank's threads:\n")
        file.flush()
        faulthandler.dump_traceback(file)


def log_to_terminal() -> None:
    """Log only to stderr, for a process that is no rank of a run."""
    _log_to([_TerminalHandler()])


def _log_to(handlers: Sequence[logging.Handler]) -> None:
    for handler in handlers:
        handler.setFormatter(_formatter())
    logger = logging.getLogger("megatron_dypo")
    logger.handlers[:] = handlers
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _formatter() -> logging.Formatter:
    return logging.Formatter(_FORMAT, datefmt=_DATE)


class _RankFile(logging.FileHandler):
    """A rank's log file. It is made at the first line, so that a rank leaves no file in a folder of another run."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", delay=True)
        self._is_failing = False

    def _open(self) -> TextIOWrapper:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Report once that lines are lost (for example on a full disk), instead of a traceback for each."""
        if not self._is_failing:
            self._is_failing = True
            print(f"megatron-dypo: {self.baseFilename} cannot be written: {sys.exc_info()[1]}", file=sys.stderr)


class _TerminalHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)
