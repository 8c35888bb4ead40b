"""The command line: ``megatron-dypo train | serve | report``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_dypo.preemption import hold_requests

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _about() -> None:
    """Dynamic Policy Optimization for Megatron-Core and SGLang."""


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file with the sections of megatron_dypo.config.Config.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Resolve, validate, print, stop.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="In a dry run, a missing file is an error too.")] = False,
) -> None:
    """Train a model; an existing run folder is resumed.

    Under torchrun this process is one rank; alone it starts the local ranks that the config asks for. On SIGUSR1 the
    ranks finish the step, write a checkpoint and end with status 75: the same command goes on from there.
    """
    hold_requests()  # before torch starts threads
    from megatron_dypo.config_io import dump_config, load_config
    from megatron_dypo.launch import check_inputs, launch

    resolved = load_config(config, overrides or [])
    notes = check_inputs(resolved)
    if strict and notes:
        raise ValueError("\n".join(notes))
    if dry_run:
        typer.echo(dump_config(resolved), nl=False)
        for note in notes:
            typer.echo(f"note: {note}", err=True)
        return
    if notes:
        raise ValueError("\n".join(notes))
    launch(resolved, config, overrides or [])


@app.command()
def serve(
    config: Annotated[Path, typer.Argument(help="The trainer's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)] = None,
    first: Annotated[int, typer.Option(help="Number of this node's first server among all.")] = 0,
    log_dir: Annotated[Path, typer.Option(help="Where each server has its log.")] = Path("logs"),
    engine_args: Annotated[str, typer.Option(help="More arguments for SGLang, in one string.")] = "",
) -> None:
    """Keep this node's SGLang servers alive for a trainer on other nodes, until SIGTERM.

    They are what `rollout.servers` describes. The API key comes from the environment variable that it names.
    """
    hold_requests()
    from megatron_dypo.config_io import load_config
    from megatron_dypo.logs import log_to_terminal
    from megatron_dypo.parallel.device import device_kind
    from megatron_dypo.rollout.process import ServerDiedError
    from megatron_dypo.rollout.serve import serve as serve_node

    log_to_terminal()
    try:
        serve_node(
            load_config(config, overrides or []),
            device=device_kind(),
            first=first,
            log_dir=log_dir,
            engine_args=engine_args,
        )
    except (ServerDiedError, TimeoutError) as error:
        sys.exit(f"megatron-dypo: error: {error}")


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="Run folder of `megatron-dypo train`.")],
) -> None:
    """Write RUN_DIR/report.html: one self-contained page of plots and samples."""
    from megatron_dypo.report.page import render_report

    typer.echo(render_report(run_dir))


def main() -> None:
    """Entry point: errors of the user are one line, without a traceback."""
    try:
        app()
    except ValueError as error:
        sys.exit(f"megatron-dypo: error: {error}")


if __name__ == "__main__":
    main()
