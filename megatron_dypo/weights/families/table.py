"""A row of a family's name table, and a row made concrete."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dypo.architecture import Architecture
from megatron_dypo.weights.rules import Rule

LAYER = "{layer}"


@dataclass(frozen=True)
class Row:
    """One parameter of the model; ``{layer}`` stands for the global index of the layer, from 0."""

    mcore: str
    """Name under Megatron-Core's local layer spec."""
    hf: tuple[str, ...]
    """HF tensors in the order that the rule expects."""
    rule: Rule
    is_copy: bool = False
    """A second copy of HF tensors that another row holds: filled on load, left out of exports."""

    def at(self, layer: int | None) -> Row:
        """This row for one layer; None for a row without ``{layer}``."""
        if layer is None:
            return self
        names = tuple(name.replace(LAYER, str(layer)) for name in self.hf)
        return Row(self.mcore.replace(LAYER, str(layer)), names, self.rule, self.is_copy)


def hidden(arch: Architecture) -> tuple[int, ...]:
    return (arch.hidden_size,)


def head(arch: Architecture) -> tuple[int, ...]:
    return (arch.head_dim,)


def attention_output(arch: Architecture) -> tuple[int, ...]:
    return (arch.hidden_size, arch.num_attention_heads * arch.head_dim)


def mlp_output(arch: Architecture) -> tuple[int, ...]:
    return (arch.hidden_size, arch.ffn_hidden_size)
