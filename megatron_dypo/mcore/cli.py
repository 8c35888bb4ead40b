"""``megatron-dypo export`` and ``megatron-dypo checkpoints``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_dypo.config.reading.command_line import Quantization


def export(
    run_dir: Annotated[Path, typer.Argument(help="Run folder of `megatron-dypo train`.")],
    step: Annotated[
        int | None, typer.Option(help="Step of the checkpoint.", show_default="the newest whole one")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="HF folder to create.", show_default="RUN_DIR/exports/step_<step>")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an HF folder that exists.")] = False,
    quantize: Annotated[Quantization, typer.Option(help="FP8 for the layers' linear weights.")] = Quantization.NONE,
) -> None:
    """Write the policy of a checkpoint as an HF folder that transformers and SGLang load.

    The bytes are those of the run's own export at that step. Needs no GPU and none of the run's ranks.
    """
    from megatron_dypo.config.reading.access import set_access_of_runs
    from megatron_dypo.mcore.checkpoints.export_run import export_run
    from megatron_dypo.metrics.logs import log_to_terminal

    log_to_terminal()
    set_access_of_runs([run_dir])
    typer.echo(export_run(run_dir, step=step, out_dir=out, overwrite=overwrite, quantization=quantize.value))


def checkpoints(
    run_dir: Annotated[Path, typer.Argument(help="Run folder of `megatron-dypo train`.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every file and compare all checksums.")] = False,
) -> None:
    """List the checkpoints of a run: step, size, age, the rules that keep each, and whether it is whole.

    Without --verify names, sizes and the small files are compared with the manifest. `megatron-dypo export RUN_DIR
    --step N` writes one as an HF folder. Exit status 65: a checkpoint is damaged.
    """
    from megatron_dypo.ending import Cause
    from megatron_dypo.mcore.checkpoints.listing import list_checkpoints, table
    from megatron_dypo.metrics.logs import log_to_terminal

    log_to_terminal()
    found = list_checkpoints(run_dir, "full" if verify else "manifest", show_progress=verify)
    typer.echo(table(found))
    if any(one.is_damaged for one in found):
        raise typer.Exit(Cause.BAD_INPUT.status)
