"""``megatron-dypo compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_dypo.config.reading.command_line import user_errors
from megatron_dypo.fs import set_access
from megatron_dypo.processes.stop_requests import hold_requests


def compare(
    path: Annotated[Path, typer.Argument(metavar="SPEC", help="YAML file; docs/comparison.md explains its keys.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, show the cells and exit.")] = False,
    table_only: Annotated[bool, typer.Option("--table-only", help="Run nothing; only write the tables again.")] = False,
    slurm: Annotated[
        bool,
        typer.Option("--slurm", help="Submit the cells that are not done as a Slurm job array (slurm/compare.sh)."),
    ] = False,
    cell: Annotated[
        list[int] | None, typer.Option(help="Run only this cell, by its number in --dry-run.", show_default=False)
    ] = None,
) -> None:
    """Train methods with several seeds, evaluate them, and write tables with intervals and tests.

    A cell is a method with one seed. Finished cells are not run again, and interrupted cells resume: the same command
    completes the comparison. On Ctrl-C, SIGTERM or SIGUSR1 the current run saves a checkpoint, and the command ends
    with status 75.
    """
    is_run = not (dry_run or slurm or table_only)
    if is_run:
        hold_requests()  # before a library starts threads
    from megatron_dypo.study.compare import Comparison, open_comparison

    with user_errors():
        comparison: Comparison = open_comparison(path)
        # Runs and evaluations of cells inherit it.
        set_access(shared=all(cell.config.run.shared_files for cell in comparison.cells))
        if dry_run and not slurm:
            typer.echo("\n".join(comparison.describe()))
        elif slurm:
            typer.echo(comparison.submit(dry_run=dry_run))
        elif table_only:
            typer.echo(comparison.write())
    if is_run:
        comparison.run(cell, say=lambda text: typer.echo(f"megatron-dypo: {text}", err=True), show=typer.echo)
