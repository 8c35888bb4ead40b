"""Log lines: the global leader's on the terminal, every rank's in the run folder."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_dypo.repeats import flush_repeated as flush_repeated
from megatron_dypo.repeats import warn_often as warn_often

_FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"
_DATE = "%Y-%m-%d %H:%M:%S%z"  # a run passes midnight, and its nodes may be in several zones


def set_up_logging(run_dir: str | Path) -> None:
    """``<run_dir>/logs/rank_00000.log`` for this rank (appended to); the first rank also writes to stderr.

    Progress bars share that stream, so lines go through tqdm, which redraws the bar below them.
    """
    rank = int(os.environ.get("RANK", "0"))
    folder = Path(run_dir) / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.FileHandler(folder / f"rank_{rank:05d}.log", encoding="utf-8")]
    if rank == 0:
        handlers.append(_TerminalHandler())
    _log_to(handlers)


def log_to_terminal() -> None:
    """Lines on stderr only, for a process that is no rank of a run."""
    _log_to([_TerminalHandler()])


def _log_to(handlers: Sequence[logging.Handler]) -> None:
    for handler in handlers:
        handler.setFormatter(logging.Formatter(_FORMAT, datefmt=_DATE))
    logger = logging.getLogger("megatron_dypo")
    logger.handlers[:] = handlers
    logger.setLevel(logging.INFO)
    logger.propagate = False


class _TerminalHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)
