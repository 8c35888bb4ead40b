"""A comparison from its spec file to its tables."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dypo.ending import RunEnded
from megatron_dypo.processes import stop_requests
from megatron_dypo.study.cells import Cell, plan_cells, require_own_settings
from megatron_dypo.study.missing import reason
from megatron_dypo.study.run_cells import run_cells
from megatron_dypo.study.spec import OUR_TRAIN_COMMAND, Spec, read_spec

Say = Callable[[str], None]
_SCRIPT = "slurm/compare.sh"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A comparison with checked spec file and configs."""

    path: Path
    spec: Spec
    cells: tuple[Cell, ...]
    groups: dict[str, tuple[str, ...]]
    """Groups of evaluation sets."""

    @property
    def sets(self) -> list[str]:
        """All evaluation sets."""
        return [name for members in self.groups.values() for name in members]

    def describe(self) -> list[str]:
        """Return a line for each cell: its number, its name, and whether it has a result.

        Raises:
            ValueError: an input of a cell breaks a rule. Files that are not on this machine may be on another.
        """
        self._require_inputs(self.cells, dry_run=True)
        return [f"{cell.number}: {cell.label}: {reason(cell) or 'done'}" for cell in self.cells]

    def write(self) -> str:
        """Write tables, page and figures of the finished cells; return the tables as Markdown."""
        from megatron_dypo.study.write import write_results  # brings scipy and plotly, which --slurm need not wait for

        return write_results(self.spec, self.cells, self.groups)

    def run(self, numbers: Sequence[int] | None, *, say: Say, show: Say) -> None:
        """Run the unfinished cells (only those with these numbers, if given), then write the results.

        Raises:
            RunEnded: the process was asked to stop; or cells are missing: the cause is that of the first.
            ValueError: there is no cell with such a number.
        """
        for number in numbers or ():
            if not 0 <= number < len(self.cells):
                raise ValueError(f"--cell={number}: must be from 0 to {len(self.cells) - 1}")
        chosen = [self.cells[number] for number in numbers] if numbers else self.cells
        _listen(say)
        self._require_inputs(chosen, dry_run=False)
        left = run_cells(chosen, self.spec, self.sets, say)
        if not numbers:
            show(self.write())
            say(f"tables, page and figures are in {self.spec.out}")
        if left:
            raise RunEnded(
                left[0].cause,
                f"{len(left)} of {len(chosen)} cells are missing; the first: {left[0]}; started again, "
                "the comparison runs these alone",
            )

    def _require_inputs(self, cells: Sequence[Cell], *, dry_run: bool) -> None:
        """Raise ValueError if a file that a run will need breaks a rule: now, not hours later, when its turn comes.

        Inputs of a user's own train command are not checked.
        """
        if self.spec.train_command != OUR_TRAIN_COMMAND:
            return
        from megatron_dypo.check.inputs import check_inputs  # brings torch

        first = {cell.arm: cell for cell in reversed(cells) if not cell.is_done()}
        found = {cell.arm.label: check_inputs(cell.config) for cell in first.values()}
        lines = [
            f"{label}: {line}" for label, one in found.items() for line in one.refused(dry_run=dry_run, strict=False)
        ]
        if lines:
            raise ValueError("\n".join(lines))

    def submit(self, *, dry_run: bool) -> str:
        """Submit a job array of the cells that are not done; return what sbatch says.

        Args:
            dry_run: return the command instead.

        Raises:
            ValueError: there is nothing to run, no script, or no Slurm; or sbatch refuses.
        """
        numbers = [str(cell.number) for cell in self.cells if not cell.is_done()]
        if not numbers:
            raise ValueError(f"{self.path}: all cells are done; --table-only writes the tables")
        script = Path(os.environ.get("DYPO_HOME", ".")) / _SCRIPT
        if not script.is_file():
            raise ValueError(f"{script}: no such file: start this in the repository's root, or set DYPO_HOME")
        command = ["sbatch", f"--array={','.join(numbers)}", str(script), str(self.path)]
        if dry_run:
            return shlex.join(command)
        if shutil.which("sbatch") is None:
            raise ValueError("--slurm: there is no sbatch on this machine")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"{shlex.join(command)}: {done.stderr.strip()}")
        return done.stdout.strip()


def open_comparison(path: Path) -> Comparison:
    """Read a comparison and check all that can be checked before something runs.

    Raises:
        ValueError: the description, a config or a folder that is there breaks a rule.
    """
    spec = read_spec(path)
    try:
        cells = plan_cells(spec)
        groups = spec.groups(cells[0].config.eval.sets)
        for cell in cells:
            if mine := set(cells[0].config.eval.sets) ^ set(cell.config.eval.sets):
                raise ValueError(f"{cell.label}: eval: has other sets than {cells[0].label}: {', '.join(sorted(mine))}")
            require_own_settings(cell)
    except ValueError as error:
        raise ValueError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from error
    return Comparison(path=path, spec=spec, cells=tuple(cells), groups=groups)


def _listen(say: Say) -> None:
    """Answer signals from now on. The first asks the current run to save a checkpoint. A second one ends this process;
    the guard then ends the run."""

    def on_insistence(number: signal.Signals) -> None:
        cause, message = stop_requests.end_of_insistence(number)
        say(f"error: {cause.label} (status {cause.status}): {message}")
        os._exit(cause.status)

    stop_requests.is_requested()  # from here on the loop over the cells ends the comparison
    stop_requests.listen(
        stop_requests.Answers(
            on_request=lambda number: say(
                f"{number.name}: the run in progress saves a checkpoint; started again, it goes on"
            ),
            on_early_request=lambda _: None,
            on_insistence=on_insistence,
        )
    )
