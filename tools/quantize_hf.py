"""Write an FP8 copy of an HF model folder. SGLang serves it at half the size of bf16.

python tools/quantize_hf.py --hf-path models/Qwen2.5-7B --out-path models/Qwen2.5-7B-FP8 --quantize fp8_block
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer


def main(
    hf_path: Annotated[Path, typer.Option(help="HF folder: config.json, safetensors, tokenizer.")],
    out_path: Annotated[Path, typer.Option(help="HF folder to create.")],
    quantize: Annotated[
        Literal["fp8_block", "fp8_channel"],
        typer.Option(help="A scale for each 128×128 block (as DeepSeek-V3's), or for each row (compressed-tensors)."),
    ] = "fp8_block",
) -> None:
    """Quantise the layers' linear weights of an HF model folder to FP8 e4m3."""
    from megatron_dypo.models.quantized.folder import quantize_hf

    quantize_hf(hf_path, out_path, quantize)
    typer.echo(out_path)


if __name__ == "__main__":
    try:
        typer.run(main)
    except (ValueError, OSError) as error:
        sys.exit(f"quantize_hf: {type(error).__name__}: {error}")
