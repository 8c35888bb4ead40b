"""A row of a family's name table, and a row made concrete."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.experts import Experts
from megatron_dypo.models.latent_attention import LatentAttention
from megatron_dypo.models.rules import Rule

Layers = Literal["all", "dense", "experts"]
"""The layers that have a parameter: all, or those with an MLP, or those with experts."""

LAYER, EXPERT = "{layer}", "{expert}"


@dataclass(frozen=True)
class Row:
    """One parameter of the model; ``{layer}`` and ``{expert}`` stand for global indices, from 0."""

    mcore: str
    """Name under Megatron-Core's local layer spec."""
    hf: tuple[str, ...]
    """HF tensors in the order that the rule expects."""
    rule: Rule
    is_copy: bool = False
    """Whether another row has the same HF tensors. Such a copy is filled on load and left out of exports."""
    layers: Layers = "all"
    needs: Callable[[Architecture], bool] | None = None
    """Says whether a model of the family has the parameter. None: each has it."""

    @property
    def is_expert(self) -> bool:
        """Return whether the rule splits over an expert-tensor group rather than a tensor-parallel group."""
        return ".mlp.experts." in self.mcore

    def is_in(self, layer: int, arch: Architecture) -> bool:
        """Return whether a layer has the parameter."""
        return self.layers == "all" or (self.layers == "experts") == arch.has_experts(layer)

    def at(self, layer: int | None, expert: int | None = None) -> Row:
        """Return this row for one layer and one of its experts. None: the row has no such placeholder."""

        def fill(name: str) -> str:
            name = name if layer is None else name.replace(LAYER, str(layer))
            return name if expert is None else name.replace(EXPERT, str(expert))

        return replace(self, mcore=fill(self.mcore), hf=tuple(fill(name) for name in self.hf))


def untied(arch: Architecture) -> bool:
    return not arch.tied_embeddings


def tied(arch: Architecture) -> bool:
    return arch.tied_embeddings


def biased_qkv(arch: Architecture) -> bool:
    return arch.qkv_bias


def normed_heads(arch: Architecture) -> bool:
    return arch.qk_norm


def compressed_query(arch: Architecture) -> bool:
    return latent(arch).query_rank is not None


def plain_query(arch: Architecture) -> bool:
    return latent(arch).query_rank is None


def hidden(arch: Architecture) -> tuple[int, ...]:
    return (arch.hidden_size,)


def head(arch: Architecture) -> tuple[int, ...]:
    return (arch.head_dim,)


def attention_output(arch: Architecture) -> tuple[int, ...]:
    return (arch.hidden_size, arch.num_attention_heads * arch.value_dim)


def mlp_output(arch: Architecture) -> tuple[int, ...]:
    return (arch.hidden_size, arch.ffn_hidden_size)


def router(arch: Architecture) -> tuple[int, ...]:
    return (_experts(arch).num_experts, arch.hidden_size)


def expert_bias(arch: Architecture) -> tuple[int, ...]:
    return (_experts(arch).num_experts,)


def shared_input(arch: Architecture) -> tuple[int, ...]:
    return (_experts(arch).shared_width, arch.hidden_size)


def shared_output(arch: Architecture) -> tuple[int, ...]:
    return (arch.hidden_size, _experts(arch).shared_width)


def query(arch: Architecture) -> tuple[int, ...]:
    return (arch.num_attention_heads * arch.head_dim, arch.hidden_size)


def query_down(arch: Architecture) -> tuple[int, ...]:
    return (_query_rank(arch), arch.hidden_size)


def query_latent(arch: Architecture) -> tuple[int, ...]:
    return (_query_rank(arch),)


def query_up(arch: Architecture) -> tuple[int, ...]:
    return (arch.num_attention_heads * arch.head_dim, _query_rank(arch))


def key_value_down(arch: Architecture) -> tuple[int, ...]:
    return (latent(arch).key_value_rank + latent(arch).rope_dim, arch.hidden_size)


def key_value_latent(arch: Architecture) -> tuple[int, ...]:
    return (latent(arch).key_value_rank,)


def key_value_up(arch: Architecture) -> tuple[int, ...]:
    channels = latent(arch).plain_dim + latent(arch).value_dim
    return (arch.num_attention_heads * channels, latent(arch).key_value_rank)


def latent(arch: Architecture) -> LatentAttention:
    assert arch.latent is not None, f"family {arch.family!r} has no latent attention"
    return arch.latent


def _query_rank(arch: Architecture) -> int:
    rank = latent(arch).query_rank
    assert rank is not None, "queries come from the hidden state"
    return rank


def expert_input(arch: Architecture) -> tuple[int, ...]:
    return (_experts(arch).ffn_hidden_size, arch.hidden_size)


def expert_output(arch: Architecture) -> tuple[int, ...]:
    return (arch.hidden_size, _experts(arch).ffn_hidden_size)


def expert_input_bias(arch: Architecture) -> tuple[int, ...]:
    return (_experts(arch).ffn_hidden_size,)


def sinks(arch: Architecture) -> tuple[int, ...]:
    return (arch.num_attention_heads,)


def _experts(arch: Architecture) -> Experts:
    assert arch.experts is not None, f"family {arch.family!r} has no experts"
    return arch.experts
