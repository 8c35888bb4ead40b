"""Models without a name table, whose names and sizes come from Megatron-Bridge (``model.family: bridge``).

This file reads from their ``config.json`` what the loop needs, without Megatron-Bridge. ``mcore/bridged`` compares the
result with the configuration that Megatron-Bridge derives from the same file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from torch import Tensor

from megatron_dypo.checks import require
from megatron_dypo.config.model import ModelConfig
from megatron_dypo.models.architecture import FAMILIES, Architecture, load_architecture
from megatron_dypo.models.hf.fields import Fields
from megatron_dypo.models.hf.json_file import read_json_object
from megatron_dypo.models.hf.rope_scaling import DEFAULT_THETA
from megatron_dypo.models.hf.write import TensorSpec

_EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class WholeWeights(Protocol):
    """The weights of all ranks, as whole HF tensors on the global leader."""

    def specs(self) -> list[TensorSpec]:
        """List the tensors that :meth:`tensors` yields here."""
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names and tensors, one at a time, on the global leader; nothing on other ranks.

        Collective over the pipeline and tensor-parallel ranks of a replica. All must exhaust the iterator.
        """
        ...


def architecture_of(model: ModelConfig) -> Architecture:
    """Return the architecture of ``model.hf_path`` as ``model.family`` says to read it.

    Raises:
        ValueError: as :func:`~megatron_dypo.models.architecture.load_architecture`; or the field that keeps a model
            from being trained through Megatron-Bridge.
    """
    return load_architecture(model.hf_path) if model.family == "auto" else load_bridged(model.hf_path)


def tabled_architecture(model: ModelConfig, what: str) -> Architecture:
    """Return the architecture of ``model.hf_path`` for ``what``, which needs a name table.

    Raises:
        ValueError: as :func:`~megatron_dypo.models.architecture.load_architecture`, and as :func:`require_table`.
    """
    require_table(model, what)
    return load_architecture(model.hf_path)


def require_table(model: ModelConfig, what: str) -> None:
    """Raise ValueError if the model's names come from Megatron-Bridge, as ``what`` needs a name table."""
    require(
        model.family == "auto", f"model.family={model.family}", f"must be auto for {what}, which needs a name table"
    )


def load_bridged(hf_path: str | Path) -> Architecture:
    """Read ``<hf_path>/config.json`` of a dense decoder that has no name table.

    Raises:
        ValueError: names file, field, value and rule.
    """
    path = Path(hf_path) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; model.hf_path must be an HF model folder")
    fields = Fields(values=read_json_object(path), where=str(path))
    family = fields.get("model_type")
    if not isinstance(family, str) or not family:
        fields.refuse("model_type", "must be a text")
    if family in FAMILIES:
        fields.refuse("model_type", "has a name table here: set model.family=auto")
    for name in _EXPERT_FIELDS:
        if fields.get(name) is not None:
            fields.refuse(name, "a model with experts cannot be trained with model.family=bridge")
    _require_plain_rope(fields)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    return Architecture(
        family=family,
        num_layers=fields.integer("num_hidden_layers"),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=fields.optional_integer("num_key_value_heads") or heads,
        head_dim=fields.optional_integer("head_dim") or hidden // heads,
        ffn_hidden_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        norm_epsilon=_norm_epsilon(fields),
        rope_theta=_rope_theta(fields),
        rope_scaling=None,
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=False,
        qk_norm=False,
    )


def _rope_theta(fields: Fields) -> float:
    """Return the base of the rotary positions, which transformers 5 writes into an object of its own."""
    inside = fields.object("rope_parameters")
    source = inside if inside is not None and "rope_theta" in inside else fields
    return source.number("rope_theta", DEFAULT_THETA, above=0)


def _require_plain_rope(fields: Fields) -> None:
    for name in ("rope_scaling", "rope_parameters"):
        inside = fields.object(name)
        if inside is None:
            continue
        for key in ("rope_type", "type"):
            if inside.get(key) not in (None, "default"):
                inside.refuse(key, "must be 'default' with model.family=bridge")


def _norm_epsilon(fields: Fields) -> float:
    names = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon")
    name = next((name for name in names if fields.get(name) is not None), names[0])
    return fields.number(name, 1e-6, above=0)
