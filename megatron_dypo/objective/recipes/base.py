"""The seam of an objective: what it needs, what it does with a graded group, and its weights on the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.objective.gal import GalStatistics
from megatron_dypo.types import Sample, Tier, TokenWeights, Totals, Treatment


@dataclass(frozen=True, kw_only=True)
class WeighedGroup:
    """Weights for each member of a group, in its order."""

    weights: Sequence[TokenWeights]
    gal: GalStatistics | None = None
    """GAL's diagnostics, where the group has a pair."""
    gal_loss: float = 0.0
    """The group's share of GAL in the objective's value: the loss itself holds only GAL's gradient."""


class Objective(Protocol):
    """One objective. The trainer calls these and knows nothing else of it."""

    def __init__(self, cfg: ObjectiveConfig) -> None: ...

    def needs_rollouts(self, step: int) -> bool:
        """False: the step learns from traces alone, no server is asked."""

    def needs_reference(self) -> bool:
        """Whether ``Sample.ref_logp`` is read."""

    def needs_current_logprobs(self) -> bool:
        """Whether ``Sample.current_logp_sum`` is read of samples that older weights made."""

    def treat(self, tier: Tier | None, step: int) -> Treatment:
        """What becomes of a group; ``tier`` is None where there were no rollouts."""

    def weigh(self, group: Sequence[Sample], totals: Totals, step: int) -> WeighedGroup:
        """Weights of one whole group: one trace, or the k rollouts of one prompt."""
