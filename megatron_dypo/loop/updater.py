"""One update of the policy, from the minibatch to the report. Called by all ranks."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dypo.batching.rollout_batch import Minibatch
from megatron_dypo.config.objective import AutoAlphaConfig, ReferenceConfig
from megatron_dypo.ending import RunEnded
from megatron_dypo.loop.bad_steps.not_finite import BadSteps, count_update
from megatron_dypo.loop.books.accounts import enter_minibatch
from megatron_dypo.loop.books.tally import Tally, tally_update, tally_work
from megatron_dypo.loop.logprobs import Logprobs
from megatron_dypo.loop.policy import Policy, UpdateReport
from megatron_dypo.loop.progress import Progress
from megatron_dypo.loop.ranks import Ranks
from megatron_dypo.loop.replica import Replica
from megatron_dypo.loop.update import count_totals, token_weights
from megatron_dypo.objective.recipes.base import Objective
from megatron_dypo.types import Totals


@dataclass(frozen=True, kw_only=True)
class Updater:
    """The parts of a run that an update uses."""

    policy: Policy
    objective: Objective
    logprobs: Logprobs
    """Computes log π_θ again where the objective reads it and the samples come from older weights."""
    replica: Replica
    ranks: Ranks
    reference: ReferenceConfig
    auto_alpha: AutoAlphaConfig
    bad_steps: BadSteps
    old_is_rollout: bool
    """Whether log π_old is the servers' (``old_logp.source``)."""
    tally: Tally


@dataclass(frozen=True, kw_only=True, eq=False)
class Update:
    """One update of the policy."""

    totals: Totals
    """Counts of the minibatch over all replicas."""
    report: UpdateReport
    end: RunEnded | None
    """The end of the run, if weights are not finite or too many updates in a row were skipped."""


def update_policy(updater: Updater, minibatch: Minibatch, progress: Progress) -> Update:
    """Make one optimizer step from ``minibatch``, and count it in ``progress``."""
    tally = updater.tally
    enter_minibatch(updater.replica, minibatch, tally)
    totals = count_totals(minibatch.groups, updater.ranks)
    groups = updater.logprobs.with_current(minibatch.groups, progress.step)
    moments = progress.moments
    objective = (
        updater.objective if moments is None else updater.objective.with_alpha(moments.alpha(updater.auto_alpha))
    )
    weighted = token_weights(groups, totals, objective, step=progress.step, tally=tally)
    tally_update(tally, weighted, progress.step, old_is_rollout=updater.old_is_rollout)
    report = updater.policy.update(weighted)
    tally_work(tally, report.flops, report.model_flops)
    end = count_update(progress, report, updater.policy, updater.replica, updater.ranks, updater.bad_steps)
    return Update(totals=totals, report=report, end=end)


def is_refresh_due(updater: Updater, step: int) -> bool:
    """Return whether the weights become the reference after ``step``."""
    return updater.policy.keeps_reference and updater.reference.is_refreshed_after(step)
