"""The base of objectives that learn from rollouts and a trace of the same prompt at once."""

from __future__ import annotations

from megatron_dypo.config.schedule import bounds
from megatron_dypo.objective.metrics import SumMetric
from megatron_dypo.objective.recipes.base import Objective
from megatron_dypo.types import GradedGroup, Treatment


class Mixed(Objective):
    """An objective that learns from the rollouts of every prompt, and from a teacher's trace if the row has one."""

    def needs_rollouts(self, step: int) -> bool:
        return True

    def needs_reference(self) -> bool:
        return bounds(self.cfg.kl_coef)[1] > 0

    def treat(self, group: GradedGroup, step: int) -> Treatment:
        return Treatment.MIX if group.prompt.traces else Treatment.REINFORCE


def trace_advantage(objective: str) -> SumMetric:
    """Return the metric of the traces' mean advantage, from the sums ``trace_advantage`` and ``judged_traces``."""
    return SumMetric(
        f"{objective}/trace_advantage",
        "",
        "mean Â* of the teachers' traces",
        of="trace_advantage",
        per="judged_traces",
        panel="Traces as members",
    )


def less_the_trace(group_size: int) -> int:
    """Return the number of rollouts in a group in which a trace takes one of ``group_size`` places.

    Raises:
        ValueError: only one rollout would be left: in a row without a trace it could be compared with nothing.
    """
    if group_size < 3:
        raise ValueError(f"rollout.group_size={group_size}: must be at least 3, since a trace takes one of the places")
    return group_size - 1
