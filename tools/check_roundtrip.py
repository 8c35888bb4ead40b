"""Convert an HF model folder to a Megatron-Core checkpoint and back, and compare every tensor bit for bit.

python tools/check_roundtrip.py --hf-path models/Qwen2.5-7B --tensor-parallel 2 --pipeline-parallel 2
python tools/check_roundtrip.py --hf-path models/Qwen2.5-7B --mcore-path models/Qwen2.5-7B-mcore
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megatron_dypo.mcore.checkpoints.roundtrip import Difference


def main(
    hf_path: Annotated[Path, typer.Option(help="HF folder: config.json, safetensors.")],
    mcore_path: Annotated[
        Path | None,
        typer.Option(help="Checkpoint that should hold the same weights; default: one is made.", show_default=False),
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(help="Tensor-parallel size of the checkpoint that is made.")] = 1,
    pipeline_parallel: Annotated[int, typer.Option(help="Pipeline-parallel size of the checkpoint that is made.")] = 1,
    first_stage_layers: Annotated[
        int | None, typer.Option(help="Layers of the first stage, as of a run.", show_default="as the others")
    ] = None,
    last_stage_layers: Annotated[
        int | None, typer.Option(help="Layers of the last stage.", show_default="as the others")
    ] = None,
    work_dir: Annotated[
        Path | None,
        typer.Option(help="Folder with room for twice the model; default: the system's temporary folder."),
    ] = None,
) -> None:
    """Check that a model comes back from a Megatron checkpoint bit for bit; exit code 1 if it does not."""
    from megatron_dypo.mcore.checkpoints.roundtrip import check_roundtrip
    from megatron_dypo.parallel.mesh import Mesh

    mesh = Mesh(
        tensor=tensor_parallel,
        pipeline=pipeline_parallel,
        first_stage_layers=first_stage_layers,
        last_stage_layers=last_stage_layers,
    )
    with tempfile.TemporaryDirectory(dir=work_dir) as folder:
        differences = check_roundtrip(
            hf_path,
            Path(folder),
            mcore_path=mcore_path,
            mesh=mesh,
        )
    if differences:
        typer.echo(table(differences))
        raise typer.Exit(1)
    typer.echo("every tensor came back bit for bit")


def table(differences: list[Difference]) -> str:
    """Return a line for each tensor, with columns aligned."""
    rows = [("tensor", "shape", "elements", "largest difference")]
    for found in differences:
        rows.append((found.name, "×".join(map(str, found.shape)), str(found.num_elements), f"{found.largest:.3g}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


if __name__ == "__main__":
    try:
        typer.run(main)
    except (ValueError, OSError) as error:
        sys.exit(f"check_roundtrip: {type(error).__name__}: {error}")
