"""Running all cells of a comparison one after the other. Finished cells are skipped; a failure does not stop the
others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_dypo.ending import Cause, RunEnded
from megatron_dypo.processes.stop_requests import STOP
from megatron_dypo.study.cells import Cell
from megatron_dypo.study.run_cell import CellFailed, run_cell
from megatron_dypo.study.spec import Spec

Say = Callable[[str], None]


def run_cells(cells: Sequence[Cell], spec: Spec, sets: Sequence[str], say: Say) -> list[RunEnded]:
    """Run the unfinished cells; return the ends of those that are still unfinished.

    Raises:
        RunEnded: the process was asked to stop.
        ValueError: a cell's folder was made with other settings. No cell has run then.
    """
    waiting = [cell for cell in cells if not cell.is_done()]
    say(f"{len(cells) - len(waiting)} of {len(cells)} cells are done")
    left = []
    for place, cell in enumerate(waiting, start=1):
        if STOP.is_set():
            raise RunEnded(Cause.STOPPED, f"stopped on request before {cell.label}")
        say(f"{cell.label} ({place} of {len(waiting)}): begins; output in {cell.folder}")
        try:
            run_cell(cell, spec, sets)
            say(f"{cell.label}: done")
        except CellFailed as error:
            say(f"{cell.label}: {error}")
            left.append(RunEnded(Cause[error.failure.cause.upper()], f"{cell.label}: {error}"))
        except RunEnded as error:
            if error.cause is Cause.STOPPED:
                raise
            say(f"{cell.label}: {error}")
            left.append(RunEnded(error.cause, f"{cell.label}: {error}"))
    return left
