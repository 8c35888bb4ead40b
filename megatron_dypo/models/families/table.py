"""A row of a family's name table, and a row made concrete."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dypo.models.architecture import Architecture, Experts
from megatron_dypo.models.rules import Rule

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

    @property
    def is_expert(self) -> bool:
        """Return whether the rule splits over an expert-tensor group rather than a tensor-parallel group."""
        return ".mlp.experts." in self.mcore

    def at(self, layer: int | None, expert: int | None = None) -> Row:
        """Return this row for one layer and one of its experts. None: the row has no such placeholder."""

        def fill(name: str) -> str:
            name = name if layer is None else name.replace(LAYER, str(layer))
            return name if expert is None else name.replace(EXPERT, str(expert))

        return Row(fill(self.mcore), tuple(fill(name) for name in self.hf), self.rule, self.is_copy)


def hidden(arch: Architecture) -> tuple[int, ...]:
    return (arch.hidden_size,)


def head(arch: Architecture) -> tuple[int, ...]:
    return (arch.head_dim,)


def attention_output(arch: Architecture) -> tuple[int, ...]:
    return (arch.hidden_size, arch.num_attention_heads * arch.head_dim)


def mlp_output(arch: Architecture) -> tuple[int, ...]:
    return (arch.hidden_size, arch.ffn_hidden_size)


def router(arch: Architecture) -> tuple[int, ...]:
    return (_experts(arch).num_experts, arch.hidden_size)


def expert_input(arch: Architecture) -> tuple[int, ...]:
    return (_experts(arch).ffn_hidden_size, arch.hidden_size)


def expert_output(arch: Architecture) -> tuple[int, ...]:
    return (arch.hidden_size, _experts(arch).ffn_hidden_size)


def _experts(arch: Architecture) -> Experts:
    assert arch.experts is not None, f"family {arch.family!r} has no experts"
    return arch.experts
