"""The modules and parameters inside the wrapped model chunks of this rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module

from megatron_dypo.models.families.registry import expert_parameter


def unwrap(chunk: torch.nn.Module) -> GPTModel:
    """The GPTModel inside the data-parallel and half-precision wrappers."""
    while isinstance(chunk, (DistributedDataParallel, Float16Module)):
        chunk = chunk.module
    return chunk


def named_global_parameters(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters under names that carry the global indices of layer and expert, wrappers stripped.

    With tied embeddings and more than one pipeline stage the last stage has its copy as ``output_layer.weight``.
    """
    for chunk in chunks:
        model = unwrap(chunk)
        global_index = {str(i): layer.layer_number - 1 for i, layer in enumerate(model.decoder.layers)}
        for name, parameter in model.named_parameters():
            head, separator, tail = name.partition("decoder.layers.")
            if separator:
                local, _, rest = tail.partition(".")
                name = f"{head}{separator}{global_index[local]}.{_with_global_expert(rest, model.decoder.layers[int(local)])}"
            yield name, parameter


def _with_global_expert(name: str, layer: Any) -> str:
    """An expert's parameter under its global index; any other name as it is."""
    found = expert_parameter(name)
    if found is None:
        return name
    index, inside = found
    return f"mlp.experts.local_experts.{layer.mlp.local_expert_indices[index]}.{inside}"
