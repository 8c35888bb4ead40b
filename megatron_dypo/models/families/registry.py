"""The name tables by family, and two queries: all rows of a model, and the row of one parameter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.families import deepseek_v3, glm4_moe, gpt_oss, llama, mistral, qwen2, qwen3, qwen3_moe
from megatron_dypo.models.families.table import EXPERT, LAYER, Row

FAMILIES = {
    "llama": llama.ROWS,
    "mistral": mistral.ROWS,
    "qwen2": qwen2.ROWS,
    "qwen3": qwen3.ROWS,
    "qwen3_moe": qwen3_moe.ROWS,
    "deepseek_v3": deepseek_v3.ROWS,
    "glm4_moe": glm4_moe.ROWS,
    "gpt_oss": gpt_oss.ROWS,
}
"""``model_type`` of the HF config → its table."""

# Transformer Engine fuses a norm into the linear layer that follows it: its name → the local spec's name.
ALIASES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
}

_ATTENTION_MODULES = ("self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention")

_LATENT_MODULES = (
    "input_layernorm",
    "self_attention.linear_kv_down_proj",
    "self_attention.linear_kv_up_proj",
    "self_attention.linear_proj",
    "self_attention.core_attention",
)
_LATENT_QUERY = ("self_attention.linear_q_down_proj", "self_attention.linear_q_up_proj")
_PLAIN_QUERY = ("self_attention.linear_q_proj",)

_QK_NORMS = ("self_attention.q_layernorm", "self_attention.k_layernorm")

FINAL_NORM_STATE = "decoder.final_layernorm._extra_state/shard_0_1"
"""Key of the state of the norm after the last layer; see :func:`state_keys`."""

_FUSED = {plain: fused for fused, plain in ALIASES.items()}
_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# One expert after the other (the local spec), or all in one module with numbered weights (Transformer Engine).
_EXPERTS = "mlp.experts"
_SEQUENTIAL = re.compile(rf"{_EXPERTS}\.local_experts\.(\d+)\.(.+)")
_GROUPED = re.compile(rf"{_EXPERTS}\.(linear_fc[12]\.(?:weight|bias))(\d+)")
_HF_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
_ROTARY_BUFFER = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def table(arch: Architecture) -> tuple[Row, ...]:
    """Return the rows of an architecture, with ``{layer}`` and ``{expert}`` in their names.

    Raises:
        ValueError: the family has no table (``model.family: bridge``).
    """
    if arch.is_bridged:
        raise ValueError(f"model_type={arch.family!r}: has no name table, which this needs")
    rows = (*FAMILIES[arch.family], llama.OUTPUT, llama.TIED_OUTPUT)
    return tuple(row for row in rows if row.needs is None or row.needs(arch))


def family_rows(arch: Architecture) -> Iterator[Row]:
    """Yield every row of a model, concrete: embedding, layer after layer, final norm, output layer."""
    rows = table(arch)
    inside = [row for row in rows if LAYER in row.mcore]
    first = rows.index(inside[0])
    yield from rows[:first]
    for layer in range(arch.num_layers):
        for row in (row for row in inside if row.is_in(layer, arch)):
            yield from (row.at(layer, expert) for expert in _experts_of(row, arch))
    yield from (row for row in rows[first:] if LAYER not in row.mcore)


def match(mcore_name: str, arch: Architecture) -> Row:
    """Return the concrete row of one parameter, given its name in the local spec or TE's, with global layer index.

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
        if row.mcore == pattern and (layer is None or row.is_in(layer, arch)):
            if expert is not None and expert not in _experts_of(row, arch):
                raise ValueError(f"{mcore_name}: expert {expert} of a model with num_experts={_num_experts(arch)}")
            return row.at(layer, expert)
    raise ValueError(f"{mcore_name}: no rule of family {arch.family!r} matches this Megatron-Core parameter")


def expert_parameter(name: str) -> tuple[int, str] | None:
    """Return (index of the expert, name within the expert) for an expert's parameter under either spec's name, else
    None.

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


def stored_key(mcore_name: str, arch: Architecture) -> tuple[str, tuple[int, ...]]:
    """Return the key of a parameter in a distributed checkpoint, and its indices on the first axes of the stored
    tensor.

    Megatron-Core stores all layers of a decoder, and all experts, in one tensor; layers of two kinds are stored one by
    one. For both specs, norms have TE's names; TE does not fuse the norm before experts, nor that before latent
    attention.

        stored_key("decoder.layers.3.input_layernorm.weight", arch)
        → ("decoder.layers.self_attention.linear_qkv.layer_norm_weight", (3,))
    """
    found = _LAYER_NAME.fullmatch(mcore_name)
    if found is None:
        return mcore_name, ()
    layer, inside = int(found[1]), found[2]
    prefix, index = _layer_prefix(layer, arch), () if arch.has_both_kinds else (layer,)
    if of_expert := expert_parameter(inside):
        return f"{prefix}{_EXPERTS}.experts.{of_expert[1]}", (*index, of_expert[0])
    return prefix + (_FUSED.get(inside, inside) if _is_fused(inside, layer, arch) else inside), index


def _layer_prefix(layer: int, arch: Architecture) -> str:
    return f"decoder.layers.{layer}." if arch.has_both_kinds else "decoder.layers."


def _is_fused(norm: str, layer: int, arch: Architecture) -> bool:
    """Return whether Transformer Engine fuses a norm, given by its name in the local spec, into a linear layer."""
    if norm == "input_layernorm.weight":
        return arch.latent is None
    if norm == "pre_mlp_layernorm.weight":
        return not arch.has_experts(layer)
    return arch.latent is not None


def layer_of(row: Row) -> int | None:
    """Return the layer of a concrete row; None before and after the layers."""
    found = _LAYER_NAME.fullmatch(row.mcore)
    return int(found[1]) if found else None


def stacked_shape(mcore_name: str, arch: Architecture) -> tuple[int, ...]:
    """Return the sizes of the first axes, those that the indices of :func:`stored_key` address, of a parameter's stored
    tensor."""
    found = _LAYER_NAME.fullmatch(mcore_name)
    if found is None:
        return ()
    layers = () if arch.has_both_kinds else (arch.num_layers,)
    return (*layers, _num_experts(arch)) if expert_parameter(found[2]) else layers


def state_keys(layer: int, arch: Architecture) -> list[str]:
    """Return the keys of the states in a distributed checkpoint that belong to a layer but are no weights.

    The states are empty except under FP8, but Megatron-Core does not load a checkpoint without them. Transformer
    Engine's norms have a state where they are modules of their own; torch's have none.
    """
    modules = [*_attention_modules(arch), *(_QK_NORMS if arch.qk_norm else ())]
    has_experts = arch.has_experts(layer)
    modules += ["pre_mlp_layernorm"] if has_experts else ["mlp.linear_fc1", "mlp.linear_fc2"]
    if has_experts and arch.experts and arch.experts.shared_width:
        modules += ["mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2"]
    at, of = ("0", "1") if arch.has_both_kinds else (str(layer), str(arch.num_layers))
    keys = [f"{module}._extra_state/shard_{at}_{of}" for module in modules]
    for expert in range(_num_experts(arch)) if has_experts else ():
        shard = f"shard_{at}.{expert}_{of}.{_num_experts(arch)}"
        if arch.has_both_kinds:
            shard = f"shard_{expert}_{_num_experts(arch)}"
        keys += [f"{_EXPERTS}.experts.{linear}._extra_state/{shard}" for linear in ("linear_fc1", "linear_fc2")]
    return [_layer_prefix(layer, arch) + key for key in keys]


def _attention_modules(arch: Architecture) -> tuple[str, ...]:
    if arch.latent is None:
        return _ATTENTION_MODULES
    return (*_LATENT_MODULES, *(_PLAIN_QUERY if arch.latent.query_rank is None else _LATENT_QUERY))


def is_carried_hf_name(name: str, arch: Architecture) -> bool:
    """Return whether an HF tensor belongs to a layer after the last one, which predicts further tokens."""
    found = _HF_LAYER.match(name)
    return found is not None and 0 <= int(found[1]) - arch.num_layers < arch.num_mtp_layers


def is_redundant_hf_name(name: str, arch: Architecture) -> bool:
    """Return whether an HF tensor is allowed but not read: a rotary buffer, or the output layer of a tied model."""
    is_tied_copy = arch.tied_embeddings and (name,) == llama.OUTPUT.hf
    return is_tied_copy or _ROTARY_BUFFER.fullmatch(name) is not None
