"""The base of objectives whose rollouts continue the first tokens of a teacher's trace."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from megatron_dypo.checks import require
from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.config.schedule import bounds
from megatron_dypo.data.teachers import draw_trace
from megatron_dypo.objective.metrics import SumMetric
from megatron_dypo.objective.recipes.base import Objective
from megatron_dypo.rollout.plan import GroupPart, GroupPlan
from megatron_dypo.types import Floats, GradedGroup, Prompt, Sample, Tokens, Treatment, Verdict


class Forced(Objective):
    """An objective that learns from every prompt's rollouts; some begin with tokens of a trace, if the row has one."""

    def __init__(self, cfg: ObjectiveConfig) -> None:
        require(cfg.ratio == "token", "objective.ratio=sequence", "must be token: forced tokens are not of one ratio")
        super().__init__(cfg)

    def needs_rollouts(self, step: int) -> bool:
        return True

    def needs_reference(self) -> bool:
        return bounds(self.cfg.kl_coef)[1] > 0

    def forces_prefixes(self) -> bool:
        return True

    def treat(self, group: GradedGroup, step: int) -> Treatment:
        return Treatment.REINFORCE


def trace_of(prompt: Prompt, seed: int) -> Tokens:
    """Return the trace that is drawn for a visit of a prompt; no tokens if its row has no trace."""
    drawn = draw_trace(prompt, seed)
    return np.empty(0, np.int32) if drawn is None else drawn[1]


def first_tokens(trace: Tokens, share: float) -> Tokens:
    """Return the first ``share`` of a trace, rounded down, without its last token: the policy must sample one."""
    return trace[: max(min(int(share * len(trace)), len(trace) - 1), 0)]


def guided_plan(trace: Tokens, sizes: Sequence[int], shares: Sequence[float], thresholds: Sequence[float]) -> GroupPlan:
    """Return a plan that gives more of a trace to later rollouts while the rewards so far are low.

    Micro-group i has ``sizes[i]`` rollouts. They begin with ``shares[i]`` of ``trace`` if the mean reward of all
    rollouts before them is below ``thresholds[i]``. The first micro-group has no prefix. A share of 1 is all of the
    trace: nothing is sampled.
    """
    numbers = {before: i for i, before in enumerate(accumulate(sizes, initial=0))}

    def then(verdicts: Sequence[Verdict]) -> Sequence[GroupPart]:
        if (number := numbers[len(verdicts)]) == len(sizes):
            return ()
        if sum(verdict.reward for verdict in verdicts) / len(verdicts) >= thresholds[number]:
            return (GroupPart(count=sizes[number]),)
        is_whole = shares[number] == 1
        prefix = trace if is_whole else first_tokens(trace, shares[number])
        return (GroupPart(count=sizes[number], prefix=prefix, is_whole=is_whole),)

    return GroupPlan(first=(GroupPart(count=sizes[0]),), then=then)


def most_uncertain(sample: Sample, share: float) -> npt.NDArray[np.bool_]:
    """Return for each forced token whether the entropy of π_old at it is among the largest ``share`` of all."""
    is_kept = np.ones(sample.num_forced_tokens, np.bool_)
    if share < 1:
        assert sample.old_entropy is not None, "log-probs and entropies come before token weights"
        by_entropy = np.argsort(sample.old_entropy[: sample.num_forced_tokens], kind="stable")
        is_kept[by_entropy[: int(len(is_kept) * (1 - share))]] = False
    return is_kept


def behind(sample: Sample, mean: float, after: float, keep: float) -> Floats:
    """Return [R] the advantages of a rollout with forced tokens and the reward R.

    They are R − ``mean`` on the most uncertain share ``keep`` of the forced tokens, 0 on the other forced tokens, and
    ``after``·R on the sampled tokens.
    """
    advantage_R = np.full(sample.num_response_tokens, after * sample.reward, np.float32)
    advantage_R[: sample.num_forced_tokens] = (sample.reward - mean) * most_uncertain(sample, keep)
    return advantage_R


def forced_sums(group: Sequence[Sample]) -> dict[str, float]:
    """Return a group's share of the sums of :func:`forced_metrics`."""
    forced = [sample for sample in group if sample.num_forced_tokens]
    shares = [sample.num_forced_tokens / sample.num_response_tokens for sample in forced]
    return {
        "members": float(len(group)),
        "forced": float(len(forced)),
        "forced_reward": sum(sample.reward for sample in forced),
        "forced_share": sum(shares),
    }


def forced_metrics(objective: str) -> tuple[SumMetric, ...]:
    """Return the metrics of rollouts with forced tokens, computed from the sums of :func:`forced_sums`."""
    panel = "Rollouts behind a trace's beginning"
    return (
        SumMetric(
            f"{objective}/forced_ratio", "fraction", "rollouts that begin with a teacher's tokens",
            of="forced", per="members", panel=panel,
        ),
        SumMetric(
            f"{objective}/forced_reward", "", "mean reward of those rollouts",
            of="forced_reward", per="forced", panel=panel,
        ),
        SumMetric(
            f"{objective}/forced_share", "fraction", "mean share of a teacher's tokens in those rollouts",
            of="forced_share", per="forced", panel=panel,
        ),
    )  # fmt: skip
