"""Convert a Megatron-Core checkpoint (``torch_dist``), converted or trained, to an HF model folder.

python tools/convert_mcore_to_hf.py --mcore-path runs/math/checkpoints/step_000200 --hf-path exports/math \
    --hf-reference models/Qwen2.5-7B
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_dypo.models.quantized.names import Quantization


def main(
    mcore_path: Annotated[Path, typer.Option(help="Checkpoint folder: a converter's, or a run's checkpoints/step_N.")],
    hf_path: Annotated[Path, typer.Option(help="HF folder to create.")],
    hf_reference: Annotated[
        Path | None,
        typer.Option(
            help="HF folder that gives configuration and tokenizer; default: hf/ in the checkpoint, which "
            "convert_hf_to_mcore.py leaves there.",
            show_default=False,
        ),
    ] = None,
    tensor_parallel: Annotated[
        int, typer.Option(help="Size that wrote the checkpoint. Not needed: the checkpoint says how it is split.")
    ] = 1,
    pipeline_parallel: Annotated[int, typer.Option(help="As above.")] = 1,
    quantize: Annotated[
        Quantization,
        typer.Option(help="FP8 e4m3 for the layers' linear weights: a scale for each 128×128 block, or for each row."),
    ] = "none",
) -> None:
    """Convert a Megatron-Core checkpoint to an HF model folder."""
    from megatron_dypo.config.reading.access import set_access_of_checkpoint
    from megatron_dypo.mcore.checkpoints.convert import mcore_to_hf

    set_access_of_checkpoint(mcore_path)
    mcore_to_hf(
        mcore_path,
        hf_path,
        hf_reference=hf_reference,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        quantization=quantize,
    )
    typer.echo(hf_path)


if __name__ == "__main__":
    try:
        typer.run(main)
    except (ValueError, OSError) as error:
        sys.exit(f"convert_mcore_to_hf: {type(error).__name__}: {error}")
