"""HF folders in FP8 as SGLang and transformers read them: tensors, written one at a time, and their config.json."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dypo.fs import new_folder
from megatron_dypo.metrics.progress import progress
from megatron_dypo.models.architecture import Architecture, load_architecture
from megatron_dypo.models.families.registry import family_rows
from megatron_dypo.models.hf.read import HFReader
from megatron_dypo.models.hf.write import MAX_FILE_BYTES, TensorSpec, finish_hf_folder, write_parts
from megatron_dypo.models.quantized.blocks import quantize
from megatron_dypo.models.quantized.names import BLOCK, Quantization, is_quantized, scale_name, scale_shape
from megatron_dypo.models.quantized.refusals import require_quantizable


def quantize_hf(
    hf_path: Path,
    out_path: Path,
    quantization: Quantization,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    show_progress: bool = True,
) -> None:
    """Write a copy of an HF folder with its linear weights in FP8.

    Raises:
        ValueError: a tensor is missing, unknown or misshapen; the HF folder is already quantised; or ``out_path`` is
            not vacant. Nothing is written then.
    """
    arch = load_architecture(hf_path)
    require_quantizable(arch, quantization)
    reader = HFReader(hf_path)
    reader.check_complete(arch)
    names = [name for row in family_rows(arch) if not row.is_copy for name in row.hf]
    plain = [TensorSpec(name, reader.dtype(name), reader.shape(name)) for name in names]
    specs = quantized_specs(plain, quantization)
    tensors = quantized_tensors(((name, reader.slice(name)[:]) for name in names), quantization)
    total = sum(spec.num_bytes for spec in specs)
    with new_folder(out_path) as folder, progress(total, "HF → FP8", "bytes", enabled=show_progress) as bar:
        write_parts(folder, "weights", specs, tensors, bar, max_file_bytes)
        finish_hf_folder(folder, hf_path, quantization_config(arch, quantization))


def quantized_specs(specs: Iterable[TensorSpec], quantization: Quantization) -> list[TensorSpec]:
    """Return the specs of the written tensors. Each quantised tensor is followed by its scales."""
    result = []
    for spec in specs:
        if quantization == "none" or not is_quantized(spec.name):
            result.append(spec)
            continue
        result.append(TensorSpec(spec.name, torch.float8_e4m3fn, spec.shape))
        shape = scale_shape(quantization, spec.shape)
        result.append(TensorSpec(scale_name(spec.name, quantization), torch.float32, shape))
    return result


def quantized_tensors(
    tensors: Iterable[tuple[str, Tensor]], quantization: Quantization
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of :func:`quantized_specs`, quantising one at a time."""
    for name, tensor in tensors:
        if quantization == "none" or not is_quantized(name):
            yield name, tensor
            continue
        weight, scales = quantize(tensor, quantization)
        yield name, weight
        yield scale_name(name, quantization), scales


def quantization_config(arch: Architecture, quantization: Quantization) -> dict[str, Any] | None:
    """Return ``quantization_config`` of config.json. Servers quantise activations dynamically.

    ``fp8_block`` is the format of DeepSeek-V3. ``fp8_channel`` is that of compressed-tensors, which SGLang also serves
    with ``--quantization w8a8_fp8``.
    """
    if quantization == "none":
        return None
    kept = ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(arch.num_layers) if arch.experts)]
    if quantization == "fp8_block":
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": kept,
        }
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**number, "strategy": "channel", "dynamic": False},
        "input_activations": {**number, "strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": kept,
    }
