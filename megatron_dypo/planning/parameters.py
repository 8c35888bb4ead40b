"""Count the parameters of the policy on one trainer rank and in total, from the name table of the model family."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.families.registry import table
from megatron_dypo.models.families.table import EXPERT, LAYER, Row
from megatron_dypo.models.quantized.names import Quantization, is_quantized, scale_shape
from megatron_dypo.planning.activations import FP32


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Numbers of parameters."""

    dense: int
    """Replicated over data and context parallel ranks."""
    experts: int
    """Replicated over the ranks of a stage that hold the same experts."""
    largest: int
    """Elements of the largest tensor."""
    fp8: int = 0
    """Weights of linear layers in FP8; ``dense`` and ``experts`` include them."""

    @property
    def total(self) -> int:
        return self.dense + self.experts

    @property
    def other(self) -> int:
        """Return the number of parameters that are not in FP8."""
        return self.total - self.fp8


@dataclass(frozen=True, kw_only=True)
class ServedBytes:
    """Bytes of the policy's weights on all GPUs of a server together."""

    dense: float
    experts: float

    @property
    def total(self) -> float:
        return self.dense + self.experts


def stage_parameters(
    arch: Architecture,
    *,
    tensor: int,
    expert: int,
    layers: int,
    is_first: bool,
    is_last: bool,
    expert_tensor: int = 1,
    fp8_layers: int = 0,
    dense_layers: int = 0,
) -> Counts:
    """Count the parameters on one rank of a pipeline stage that holds ``layers`` layers, ``fp8_layers`` of them in FP8
    and, if the model has layers of two kinds, ``dense_layers`` with an MLP.

    With tied embeddings, a stage that is both first and last holds one copy of the embedding; otherwise the last stage
    holds a second copy.
    """
    dense = experts = largest = fp8 = 0
    for row in table(arch):
        holding = _holding(row, layers, dense_layers)
        copies = _copies(row, arch, expert, holding, is_first, is_last)
        size = math.prod(row.rule.mcore_shape(arch, expert_tensor if row.is_expert else tensor))
        largest = max(largest, size if copies else 0)
        if row.is_expert:
            experts += copies * size
        else:
            dense += copies * size
        if _is_linear(row) and fp8_layers:
            fp8 += copies // layers * fp8_layers * size
    return Counts(dense=dense, experts=experts, largest=largest, fp8=fp8)


def whole_model(arch: Architecture) -> Counts:
    """Count the parameters of the whole policy, as a server holds it."""
    return _whole(arch, with_embeddings=True)


def served_bytes(arch: Architecture, element: int, quantization: Quantization, copies: int = 1) -> ServedBytes:
    """Return the bytes of the policy as a server holds it and as a refit moves it.

    Args:
        element: bytes of a value that is not quantised.
        quantization: format of linear weights (``models/quantized/names.py``): a byte each, and fp32 scales.
        copies: copies of attention and of the embedding that the server holds (SGLang's ``--attn-dp-size``).
    """
    dense = experts = 0
    for row in table(arch):
        holding = _holding(row, arch.num_layers, arch.num_dense_layers)
        number = _copies(row, arch, 1, holding, is_first=True, is_last=True)
        is_narrow = quantization != "none" and _is_linear(row)
        for shape in row.rule.hf_shapes(arch):
            size = math.prod(shape)
            each = size + FP32 * math.prod(scale_shape(quantization, shape)) if is_narrow else size * element
            if row.is_expert:
                experts += number * each
            else:
                dense += number * each * (copies if _is_copied(row) else 1)
    return ServedBytes(dense=dense, experts=experts)


def _is_copied(row: Row) -> bool:
    """Return whether each copy of attention has the parameter."""
    return row.mcore.startswith("embedding.") or ".self_attention." in row.mcore


def active_parameters(arch: Architecture) -> int:
    """Count the parameters of the layers that a token uses: all dense ones, and those of the experts that it visits."""
    counts = _whole(arch, with_embeddings=False)
    if arch.experts is None:
        return counts.dense
    return counts.dense + counts.experts * arch.experts.per_token // arch.experts.num_experts


def _whole(arch: Architecture, *, with_embeddings: bool) -> Counts:
    return stage_parameters(
        arch,
        tensor=1,
        expert=1,
        layers=arch.num_layers,
        is_first=with_embeddings,
        is_last=with_embeddings,
        dense_layers=arch.num_dense_layers,
    )


def _is_linear(row: Row) -> bool:
    """Return whether a parameter is the weight of a transformer's linear layer, which trainer and servers can hold in
    FP8."""
    return all(is_quantized(name) for name in row.at(0, 0).hf)


def _holding(row: Row, layers: int, dense_layers: int) -> int:
    """Return how many of ``layers`` layers have a parameter, if ``dense_layers`` of them have an MLP."""
    return {"all": layers, "dense": dense_layers, "experts": layers - dense_layers}[row.layers]


def _copies(row: Row, arch: Architecture, expert: int, layers: int, is_first: bool, is_last: bool) -> int:
    if LAYER in row.mcore:
        local_experts = arch.experts.num_experts // expert if arch.experts and EXPERT in row.mcore else 1
        return layers * local_experts
    if row.is_copy:
        return int(is_last and not is_first)
    return int(is_first if row.mcore.startswith("embedding.") else is_last)
