"""One cell from the current state of its folder to its result: train or resume, evaluate, mark as done."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from megatron_dypo.ending import Cause, RunEnded, cause_of_status
from megatron_dypo.eval.records import SUMMARY_FILE, read_records, records_path
from megatron_dypo.launch.run_lock import RunLock
from megatron_dypo.metrics.progress import Progress, progress
from megatron_dypo.metrics.status import Record, read_status
from megatron_dypo.processes.stop_requests import STOP
from megatron_dypo.study.cells import Cell, Failure, mark_done, require_own_settings, write_configs
from megatron_dypo.study.command import CommandEnd, run_command
from megatron_dypo.study.spec import Spec

_SHORTEST_GRACE_S = 60.0


class CellFailed(Exception):  # noqa: N818 (an end of the cell, not of the comparison)
    """A cell could not be completed. The failure says where and why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text())
        self.failure = failure


def run_cell(cell: Cell, spec: Spec, sets: Sequence[str]) -> None:
    """Complete a cell. A finished cell is left unchanged; an interrupted cell resumes.

    Args:
        sets: names of the evaluation sets that must have records.

    Raises:
        RunEnded: another process runs the cell (``IN_USE``); or this one was asked to stop (``STOPPED``).
        ValueError: the cell's folder was made with other settings.
        CellFailed: a command failed; ``failed.json`` has the same report.
    """
    cell.folder.mkdir(parents=True, exist_ok=True)
    lock = RunLock(cell.folder, on_loss=_leave)
    lock.acquire()
    try:
        if cell.is_done():  # another process has completed it in the meantime
            return
        require_own_settings(cell)
        write_configs(cell)
        cell.failed_path.unlink(missing_ok=True)
        if not is_trained(cell):
            _train(cell, spec)
        _evaluate(cell, spec)
        mark_done(cell, {"responses": _count_records(cell, sets)})
    except CellFailed as error:
        error.failure.write(cell.failed_path)
        raise
    finally:
        lock.release()


def is_trained(cell: Cell) -> bool:
    """Return whether the cell's run has made all its steps and exported its model."""
    return _is_done(read_status(cell.run_dir)) and (cell.run_dir / "hf").is_dir()


def _is_done(status: Record | None) -> bool:
    return status is not None and status.state == "ended" and status.cause == Cause.DONE.label


def _train(cell: Cell, spec: Spec) -> None:
    before, steps = read_status(cell.run_dir), cell.config.run.steps
    with progress(steps, cell.label, "steps") as bar:
        end = _run(cell, spec.train_command, "train.log", _step_counter(cell, bar))
    after = read_status(cell.run_dir)
    is_of_this_start = after is not None and (before is None or after.attempt != before.attempt)
    if STOP.is_set():
        raise RunEnded(Cause.STOPPED, f"stopped on request while {cell.label} was trained")
    if end.status == 0 and is_trained(cell):
        return
    if end.status == Cause.IN_USE.status:  # processes of a comparison that was killed, which still save a checkpoint
        raise RunEnded(Cause.IN_USE, end.words)
    if end.status and after is not None and is_of_this_start and after.cause is not None:
        raise CellFailed(Failure(stage="training", status=end.status, cause=after.cause, message=after.message))
    raise _failed(cell, "training", end, "train.log")


def _evaluate(cell: Cell, spec: Spec) -> None:
    end = _run(cell, spec.eval_command, "eval.log", lambda: None)
    if STOP.is_set():
        raise RunEnded(Cause.STOPPED, f"stopped on request while {cell.label} was evaluated")
    if end.status:
        raise _failed(cell, "evaluation", end, "eval.log")


def _run(cell: Cell, words: Sequence[str], log: str, on_look: Callable[[], None]) -> CommandEnd:
    """Run one of the cell's commands; its placeholders get their values."""
    values = {
        "cell": cell.folder,
        "config": cell.config_path,
        "model": cell.run_dir / "hf",
        "sets": cell.sets_path,
        "out": cell.eval_dir,
    }
    command = list(words)
    for name, value in values.items():
        command = [word.replace(f"{{{name}}}", str(value)) for word in command]
    # A run that is asked to stop finishes its step and saves a checkpoint; its watchdog knows how long that may take.
    grace_s = max(cell.config.run.watchdog_s, _SHORTEST_GRACE_S)
    return run_command(command, cell.folder / log, grace_s=grace_s, on_look=on_look)


def _step_counter(cell: Cell, bar: Progress) -> Callable[[], None]:
    shown = [0]

    def look() -> None:
        status = read_status(cell.run_dir)
        if status is not None and status.step > shown[0]:
            bar.update(status.step - shown[0])
            shown[0] = status.step

    return look


def _failed(cell: Cell, stage: str, end: CommandEnd, log: str) -> CellFailed:
    cause = cause_of_status(end.status) or (Cause.RANK_LOST if end.status > 128 else Cause.BUG)  # 128 + signal
    message = f"{end.words} (see {cell.folder / log})"
    if end.status == 0:
        message = f"ended with status 0, but {cell.run_dir} has no run that is done with its model: {message}"
    return CellFailed(Failure(stage=stage, status=end.status, cause=cause.label, message=message))


def _count_records(cell: Cell, sets: Sequence[str]) -> dict[str, int]:
    """Return the number of responses to each set.

    Raises:
        CellFailed: the evaluation did not write its summary, or a set has no records or damaged ones.
    """
    try:
        counts = {name: len(read_records(records_path(cell.eval_dir, name))) for name in sets}
    except ValueError as error:
        message = f"ended with status 0, but wrote what is no record: {error}"
        raise CellFailed(Failure(stage="evaluation", status=0, cause=Cause.BUG.label, message=message)) from error
    lacking = [str(records_path(cell.eval_dir, name)) for name in sets if not counts[name]]
    if not (cell.eval_dir / SUMMARY_FILE).is_file():
        lacking.append(str(cell.eval_dir / SUMMARY_FILE))
    if lacking:
        message = f"ended with status 0, but wrote nothing to {', '.join(lacking)}"
        raise CellFailed(Failure(stage="evaluation", status=0, cause=Cause.BUG.label, message=message))
    return counts


def _leave(message: str) -> None:
    """End this process, since another one runs the cell. The guard then ends the command."""
    print(f"megatron-dypo: error: {message}", flush=True)
    os._exit(Cause.IN_USE.status)
