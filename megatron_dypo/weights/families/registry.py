"""The name tables by family, and the two ways to ask them: all rows of a model, or the row of one parameter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from megatron_dypo.architecture import Architecture
from megatron_dypo.weights.families import llama, qwen2, qwen3, qwen3_moe
from megatron_dypo.weights.families.table import EXPERT, LAYER, Row

FAMILIES = {"llama": llama.ROWS, "qwen2": qwen2.ROWS, "qwen3": qwen3.ROWS, "qwen3_moe": qwen3_moe.ROWS}

# Transformer Engine fuses a norm into the linear layer that follows it: its name → the local spec's name.
ALIASES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}

# Modules of a layer for which a distributed checkpoint also holds a state beside the weights. It is empty except under
# FP8, but Megatron-Core does not load a checkpoint without it. Names under the decoder's layers.
STATEFUL_MODULES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)

_FUSED = {plain: fused for fused, plain in ALIASES.items()}
_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# One expert after the other (the local spec), or all in one module with numbered weights (Transformer Engine).
_EXPERTS = "mlp.experts"
_SEQUENTIAL = re.compile(rf"{_EXPERTS}\.local_experts\.(\d+)\.(.+)")
_GROUPED = re.compile(rf"{_EXPERTS}\.(linear_fc[12]\.weight)(\d+)")
_ROTARY_BUFFER = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def table(arch: Architecture) -> tuple[Row, ...]:
    """The rows of an architecture, ``{layer}`` and ``{expert}`` still in them."""
    return (*FAMILIES[arch.family], llama.TIED_OUTPUT if arch.tied_embeddings else llama.OUTPUT)


def family_rows(arch: Architecture) -> Iterator[Row]:
    """Every row of a model, concrete: embedding, layer after layer, final norm, output layer."""
    rows = table(arch)
    inside = [row for row in rows if LAYER in row.mcore]
    first = rows.index(inside[0])
    yield from rows[:first]
    for layer in range(arch.num_layers):
        for row in inside:
            yield from (row.at(layer, expert) for expert in _experts_of(row, arch))
    yield from (row for row in rows[first:] if LAYER not in row.mcore)


def match(mcore_name: str, arch: Architecture) -> Row:
    """The concrete row of one parameter, named with its global layer index, by the local spec's name or TE's.

    Raises:
        ValueError: no row of the family matches, or the layer does not exist.
    """
    pattern, layer, expert = mcore_name, None, None
    if found := _LAYER_NAME.fullmatch(mcore_name):
        layer, inside = int(found[1]), ALIASES.get(found[2], found[2])
        if layer >= arch.num_layers:
            raise ValueError(f"{mcore_name}: layer {layer} of a model with num_layers={arch.num_layers}")
        if of_expert := expert_parameter(inside):
            expert, inside = of_expert[0], f"{_EXPERTS}.local_experts.{EXPERT}.{of_expert[1]}"
        pattern = f"decoder.layers.{LAYER}.{inside}"
    for row in table(arch):
        if row.mcore == pattern:
            if expert is not None and expert not in _experts_of(row, arch):
                raise ValueError(f"{mcore_name}: expert {expert} of a model with num_experts={_num_experts(arch)}")
            return row.at(layer, expert)
    raise ValueError(f"{mcore_name}: no rule of family {arch.family!r} matches this Megatron-Core parameter")


def expert_parameter(name: str) -> tuple[int, str] | None:
    """Index of the expert and name within it of an expert's parameter in a layer, by either spec's name; else None.

    expert_parameter("mlp.experts.linear_fc1.weight3") → (3, "linear_fc1.weight")
    """
    if found := _SEQUENTIAL.fullmatch(name):
        return int(found[1]), found[2]
    if found := _GROUPED.fullmatch(name):
        return int(found[2]), found[1]
    return None


def _experts_of(row: Row, arch: Architecture) -> Iterable[int | None]:
    return range(_num_experts(arch)) if EXPERT in row.mcore else (None,)


def _num_experts(arch: Architecture) -> int:
    return arch.experts.num_experts if arch.experts else 0


def stored_key(mcore_name: str) -> tuple[str, int | None]:
    """Key of a parameter in a distributed checkpoint, and its index on the first axis if layers are stacked there.

    Megatron-Core stores the layers of a decoder as one tensor, and norms under TE's fused names whatever the spec.

        stored_key("decoder.layers.3.input_layernorm.weight")
        → ("decoder.layers.self_attention.linear_qkv.layer_norm_weight", 3)
    """
    found = _LAYER_NAME.fullmatch(mcore_name)
    if found is None:
        return mcore_name, None
    return f"decoder.layers.{_FUSED.get(found[2], found[2])}", int(found[1])


def is_redundant_hf_name(name: str, arch: Architecture) -> bool:
    """Whether an HF tensor may be there and is not read: a rotary buffer, or the output layer of a tied model."""
    is_tied_copy = arch.tied_embeddings and (name,) == llama.OUTPUT.hf
    return is_tied_copy or _ROTARY_BUFFER.fullmatch(name) is not None
