"""The choice of page for a list of runs, and its updates while the runs go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_dypo.metrics.records import METRICS_FILE
from megatron_dypo.metrics.report.comparison import render_comparison
from megatron_dypo.metrics.report.page import render_report
from megatron_dypo.metrics.status import NAME as STATUS_FILE
from megatron_dypo.metrics.status import read_status

COMPARISON_FILE = "comparison.html"


def write_page(run_dirs: Sequence[Path], out: Path | None, *, reload_s: int | None = None) -> Path:
    """Write the report of one run, or the comparison of several, and return its path.

    Args:
        out: the page; None: ``RUN/report.html`` for one run, ``comparison.html`` for several.
        reload_s: seconds after which a browser loads the page again; None: it does not.

    Raises:
        ValueError: a folder is not a run's, or a file of it is damaged.
    """
    if len(run_dirs) == 1:
        return render_report(run_dirs[0], out=out, reload_s=reload_s)
    return render_comparison(run_dirs, out or Path(COMPARISON_FILE), reload_s=reload_s)


def follow(
    run_dirs: Sequence[Path],
    out: Path | None,
    *,
    every_s: int,
    say: Callable[[str], object],
    wait: Callable[[float], object] = time.sleep,
) -> None:
    """Write the page again whenever a run has written something, until every run has ended.

    The page reloads itself in the browser every ``every_s`` seconds; the final page does not. The function waits for
    runs without metrics. Ctrl-C ends it and keeps the last page.

    Args:
        say: prints a line, at the first page and at the end.
        wait: waits for the given seconds between two looks.
    """
    seen: object = None
    while not all((run_dir / METRICS_FILE).is_file() for run_dir in run_dirs):
        if seen is None:
            say(f"waiting for {METRICS_FILE} in {', '.join(map(str, run_dirs))}")
            seen = ()
        wait(every_s)
    seen = None
    while not all(_has_ended(run_dir) for run_dir in run_dirs):
        state = [_state(run_dir) for run_dir in run_dirs]
        if state != seen:
            path = write_page(run_dirs, out, reload_s=every_s)
            if seen is None:
                say(f"{path}: open it in a browser; it reloads every {every_s} s. Ctrl-C ends the watch, not the run")
            seen = state
        wait(every_s)
    say(f"{write_page(run_dirs, out)}: final, every run has ended")


def _has_ended(run_dir: Path) -> bool:
    status = read_status(run_dir)
    return status is not None and status.state == "ended"


def _state(run_dir: Path) -> list[tuple[int, int]]:
    """Return size and time of the files whose change requires a new page."""
    facts = [path.stat() for name in (METRICS_FILE, STATUS_FILE) if (path := run_dir / name).is_file()]
    return [(fact.st_size, fact.st_mtime_ns) for fact in facts]
