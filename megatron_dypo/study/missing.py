"""Why a cell has no result, in one line for the table."""

from __future__ import annotations

from megatron_dypo.ending import RunEnded
from megatron_dypo.launch.run_lock import require_free
from megatron_dypo.metrics.status import read_status
from megatron_dypo.study.cells import Cell, failure_of


def reason(cell: Cell) -> str | None:
    """Return why the cell has no result; None if it has one."""
    if cell.is_done():
        return None
    if not cell.folder.is_dir():
        return "not run yet"
    try:
        require_free(cell.folder)
    except RunEnded:
        return f"is being run ({progress(cell)})"
    failure = failure_of(cell)
    return failure.text() if failure is not None else f"broken off ({progress(cell)}); it goes on when started again"


def progress(cell: Cell) -> str:
    """Return the progress of the cell, in words."""
    status = read_status(cell.run_dir)
    if status is None:
        return "before its first step"
    if status.state == "ended" and status.cause == "done":
        return "trained, not evaluated"
    return f"{status.step} of {cell.config.run.steps} steps"
