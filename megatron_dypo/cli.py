"""The command line, ``megatron-dypo COMMAND``. Each command is in the ``cli.py`` of its room.

A command imports what it needs when it runs, so that ``--help`` loads neither torch nor Megatron.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import megatron_dypo
from megatron_dypo.check.cli import check, doctor
from megatron_dypo.config.cli import init, show_config
from megatron_dypo.eval.cli import evaluate
from megatron_dypo.grading.cli import grade
from megatron_dypo.launch.attempt import end_of
from megatron_dypo.launch.cli import probe, replay, route, serve, train
from megatron_dypo.mcore.cli import checkpoints, export
from megatron_dypo.metrics.report.cli import report
from megatron_dypo.planning.cli import plan, plan_refit
from megatron_dypo.study.cli import compare

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"megatron-dypo {megatron_dypo.__version__}")
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Dynamic Policy Optimization for Megatron-Core and SGLang."""


app.command()(init)
app.command("config")(show_config)
app.command()(check)
app.command()(doctor)
app.command()(train)
app.command()(probe)
app.command()(replay)
app.command()(report)
app.command()(compare)
app.command()(export)
app.command()(checkpoints)
app.command("eval")(evaluate)
app.command()(grade)
app.command()(plan)
app.command("plan-refit")(plan_refit)
app.command()(serve)
app.command()(route)


def main() -> None:
    """Run a command. A user's error is one line without a traceback; the exit status tells the cause."""
    try:
        app()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 (every end of a command passes here and is reported)
        sys.exit(end_of(error))


if __name__ == "__main__":
    main()
