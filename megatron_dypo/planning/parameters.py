"""Parameters of the policy: on one rank of the trainer, and in total. Read off the name table of the family."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_dypo.architecture import Architecture
from megatron_dypo.weights.families.registry import table
from megatron_dypo.weights.families.table import EXPERT, LAYER, Row


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Numbers of parameters."""

    dense: int
    """Replicated over data and context parallel ranks."""
    experts: int
    """Replicated over the ranks of a stage that hold the same experts."""
    largest: int
    """Of the largest single tensor."""

    @property
    def total(self) -> int:
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
) -> Counts:
    """Parameters on one rank of a pipeline stage that holds ``layers`` layers.

    Stages of tied embeddings that are first and last hold one copy; a last stage that is not first its own.
    """
    dense = experts = largest = 0
    for row in table(arch):
        copies = _copies(row, arch, expert, layers, is_first, is_last)
        size = math.prod(row.rule.mcore_shape(arch, expert_tensor if row.is_expert else tensor))
        largest = max(largest, size if copies else 0)
        if row.is_expert:
            experts += copies * size
        else:
            dense += copies * size
    return Counts(dense=dense, experts=experts, largest=largest)


def whole_model(arch: Architecture) -> Counts:
    """The policy once, as a server holds it."""
    return stage_parameters(arch, tensor=1, expert=1, layers=arch.num_layers, is_first=True, is_last=True)


def active_parameters(arch: Architecture) -> int:
    """Parameters that a token is multiplied with in the layers: of experts, those that it visits."""
    counts = stage_parameters(arch, tensor=1, expert=1, layers=arch.num_layers, is_first=False, is_last=False)
    if arch.experts is None:
        return counts.dense
    return counts.dense + counts.experts * arch.experts.per_token // arch.experts.num_experts


def _copies(row: Row, arch: Architecture, expert: int, layers: int, is_first: bool, is_last: bool) -> int:
    if LAYER in row.mcore:
        local_experts = arch.experts.num_experts // expert if arch.experts and EXPERT in row.mcore else 1
        return layers * local_experts
    if row.is_copy:
        return int(is_last and not is_first)
    return int(is_first if row.mcore.startswith("embedding.") else is_last)
