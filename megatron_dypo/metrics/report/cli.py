"""``megatron-dypo report``."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from megatron_dypo.config.reading.command_line import user_errors


def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders of `megatron-dypo train`.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Page to write.", show_default="RUN/report.html, or comparison.html for several runs"),
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Rewrite the page until the runs end; it reloads itself.")
    ] = False,
    every_s: Annotated[int, typer.Option("--every-s", min=1, help="Seconds between two looks with --live.")] = 15,
) -> None:
    """Write one self-contained HTML page: plots and samples of one run, or a comparison of several runs."""
    from megatron_dypo.config.reading.access import set_access_of_runs
    from megatron_dypo.metrics.report.live import follow, write_page

    set_access_of_runs(run_dirs)
    with user_errors():
        if not live:
            typer.echo(write_page(run_dirs, out))
            return
        with suppress(KeyboardInterrupt):
            follow(run_dirs, out, every_s=every_s, say=typer.echo)
