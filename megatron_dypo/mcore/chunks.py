"""The modules and parameters inside the wrapped model chunks of this rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, cast

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dypo.mcore.moe_router import expert_biases
from megatron_dypo.mcore.param_gather import finish_gather
from megatron_dypo.models.families.registry import expert_parameter


class _Mlp(Protocol):
    local_expert_indices: Sequence[int]
    """Global indices of this rank's experts. Only a mixture of experts has this field."""


class _Layer(Protocol):
    layer_number: int
    """Global number of the layer, from 1."""
    mlp: _Mlp


class _Decoder(Protocol):
    layers: Sequence[_Layer]


class GPTChunk(Protocol):
    """The part of Megatron's GPTModel, and of ``PolicyModel``, that this package reads or sets."""

    config: TransformerConfig
    decoder: _Decoder
    scores_entropy: bool

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]: ...

    def sharded_state_dict(self, *, metadata: Mapping[str, object] | None = None) -> dict[str, object]: ...

    def load_state_dict(self, state: Mapping[str, object]) -> object: ...


def unwrap(chunk: torch.nn.Module) -> GPTChunk:
    """Return the GPTModel inside the data-parallel and half-precision wrappers."""
    while isinstance(chunk, (DistributedDataParallel, Float16Module)):
        chunk = chunk.module
    return cast("GPTChunk", chunk)


def main_grad(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return the gradient in the buffer of Megatron's DDP, where it is summed over microbatches."""
    return cast("torch.Tensor", parameter.main_grad)  # type: ignore[attr-defined]


def named_global_parameters(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield this rank's parameters. Names have global indices of layer and expert, and no prefix of wrappers.

    With tied embeddings and more than one pipeline stage the last stage has its copy as ``output_layer.weight``.
    """
    finish_gather(chunks)
    for chunk in chunks:
        model = unwrap(chunk)
        for name, parameter in model.named_parameters():
            yield _global_name(name, model), parameter


def named_global_weights(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield this rank's weights: :func:`named_global_parameters`, and the router biases that no gradient trains."""
    yield from named_global_parameters(chunks)
    for chunk in chunks:
        for name, bias in expert_biases(chunk):
            yield _global_name(name[name.index("decoder.layers.") :], unwrap(chunk)), bias


def _global_name(name: str, model: GPTChunk) -> str:
    head, separator, tail = name.partition("decoder.layers.")
    if not separator:
        return name
    local, _, rest = tail.partition(".")
    layer = model.decoder.layers[int(local)]
    return f"{head}{separator}{layer.layer_number - 1}.{_with_global_expert(rest, layer)}"


def _with_global_expert(name: str, layer: _Layer) -> str:
    """Return the name of an expert's parameter with its global index; other names unchanged."""
    found = expert_parameter(name)
    if found is None:
        return name
    index, inside = found
    return f"mlp.experts.local_experts.{layer.mlp.local_expert_indices[index]}.{inside}"
