"""Convert an HF model folder to a Megatron-Core checkpoint (``torch_dist``), which loads at any parallel sizes.

python tools/convert_hf_to_mcore.py --hf-path models/Qwen2.5-7B --mcore-path models/Qwen2.5-7B-mcore \
    --tensor-parallel 2 --pipeline-parallel 2
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def main(
    hf_path: Annotated[Path, typer.Option(help="HF folder: config.json, safetensors, tokenizer.")],
    mcore_path: Annotated[Path, typer.Option(help="Checkpoint folder to create.")],
    tensor_parallel: Annotated[int, typer.Option(help="Tensor-parallel size whose shards are written.")] = 1,
    pipeline_parallel: Annotated[int, typer.Option(help="Pipeline-parallel size whose stages are written.")] = 1,
    first_stage_layers: Annotated[
        int | None, typer.Option(help="Layers of the first stage, as of a run.", show_default="as the others")
    ] = None,
    last_stage_layers: Annotated[
        int | None, typer.Option(help="Layers of the last stage.", show_default="as the others")
    ] = None,
) -> None:
    """Convert an HF model folder to a Megatron-Core checkpoint."""
    from megatron_dypo.mcore.checkpoints.convert import hf_to_mcore
    from megatron_dypo.parallel.mesh import Mesh

    mesh = Mesh(
        tensor=tensor_parallel,
        pipeline=pipeline_parallel,
        first_stage_layers=first_stage_layers,
        last_stage_layers=last_stage_layers,
    )
    hf_to_mcore(hf_path, mcore_path, mesh=mesh)
    typer.echo(mcore_path)


if __name__ == "__main__":
    try:
        typer.run(main)
    except (ValueError, OSError) as error:
        sys.exit(f"convert_hf_to_mcore: {type(error).__name__}: {error}")
