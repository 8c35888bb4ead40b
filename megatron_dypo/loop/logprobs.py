"""Log-probs for samples: log π_old, log π_ref, and log π_θ if the weights have changed since. Called by all ranks.

The functions return new groups and do not change their arguments. Ranks that hold no samples pass none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from megatron_dypo.batching.queues import Group
from megatron_dypo.config.objective import OldLogpConfig
from megatron_dypo.loop.books.tally import Tally, tally_gap, tally_logprob_error
from megatron_dypo.loop.policy import Policy
from megatron_dypo.metrics.writer import Timings
from megatron_dypo.types import Floats, Sample, SampleKind


def without_logprobs(groups: Iterable[Group]) -> list[Sample]:
    """Return the rollouts that have no log-probs under π_old yet."""
    return [s for group in groups for s in group if s.kind is SampleKind.ROLLOUT and s.old_logp is None]


def of_other_versions(groups: Iterable[Group], version: int) -> list[Sample]:
    """Return the rollouts whose log π_old was not computed by the weights of ``version``."""
    return [s for group in groups for s in group if s.kind is SampleKind.ROLLOUT and s.logp_version != version]


@dataclass(frozen=True, kw_only=True)
class Logprobs:
    """Computes the log-probs that config and objective need."""

    policy: Policy
    cfg: OldLogpConfig
    reads_reference: bool
    """Whether the objective reads log π_ref."""
    reads_current: bool
    """Whether it reads log π_θ of samples that older weights made."""
    reads_entropy: bool = False
    """Whether it reads the entropy of π_old of rollouts with forced tokens."""
    replay: Literal["off", "rollout", "trainer"] = "off"
    """``objective.replay``."""
    is_asynchronous: bool
    """Whether rollouts are sampled while updates change the weights."""
    tally: Tally
    timings: Timings

    @property
    def are_of_one_version(self) -> bool:
        """Return whether π_old is the policy at the start of a rollout batch, rather than the policy that sampled.

        In a synchronous run the weights have not changed since the sampling, so it computes the log-probs of all new
        groups. An asynchronous run computes those of the groups that enter the batch, and ``objective.importance``
        corrects for the difference to the policy that sampled.
        """
        return self.is_asynchronous and self.cfg.source == "trainer"

    def is_check_due(self, number: int) -> bool:
        """Return whether the servers' log-probs are checked in rollout batch ``number``, from 0."""
        return self.cfg.check_every > 0 and number % self.cfg.check_every == 0

    def complete(self, groups: Sequence[Group], version: int, *, checks_servers: bool = False) -> list[Group]:
        """Return the groups; those without log π_old and log π_ref get them.

        Args:
            version: version of the policy's weights.
            checks_servers: measure the error of the servers' log-probs, if they are used as log π_old, and what the
                replay of their routes changes.
        """
        return self._compute(groups, without_logprobs(groups), version, checks_servers)

    def renew(self, groups: Sequence[Group], version: int, *, checks_servers: bool = False) -> list[Group]:
        """Return the groups with log π_old and log π_ref, computed again if π_old was of another version."""
        return self._compute(groups, of_other_versions(groups, version), version, checks_servers)

    def again(self, groups: Sequence[Group], version: int) -> list[Group]:
        """Return the groups; those with log π_old and log π_ref get them anew, by the weights of now."""
        rollouts = [s for group in groups for s in group if s.kind is SampleKind.ROLLOUT and s.old_logp is not None]
        return self._compute(groups, rollouts, version, checks_servers=False)

    def with_current(self, groups: Sequence[Group], version: int) -> list[Group]:
        """Return the groups; if the objective reads log π_θ, those whose π_old is older than the weights get it."""
        if not self.reads_current:
            return list(groups)
        stale = [s for group in groups for s in group if s.logp_version is not None and s.logp_version < version]
        with self.timings.measure("old_log_prob"):
            current = self.policy.logprobs(stale)
        pairs = zip(stale, current, strict=True)
        return _replaced(groups, [replace(s, current_logp_sum=float(logp.sum(dtype="float64"))) for s, logp in pairs])

    def _compute(
        self, groups: Sequence[Group], samples: Sequence[Sample], version: int, checks_servers: bool
    ) -> list[Group]:
        with self.timings.measure("old_log_prob"):
            if checks_servers and self.replay == "rollout":
                self._measure_replay(samples)
            if self.replay == "trainer":
                old, routes = self.policy.logprobs_and_routes(samples)
                samples = [replace(s, routes=one) for s, one in zip(samples, routes, strict=True)]
            elif self.cfg.source == "trainer":
                old = self.policy.logprobs(samples)
            else:
                if checks_servers:
                    self._check_servers(samples)
                old = [_server_logp(sample) for sample in samples]
        entropies = self._entropies(samples)
        reference = old
        if self.reads_reference and self.policy.keeps_reference:
            with self.timings.measure("ref_log_prob"):
                reference = self.policy.reference_logprobs(samples)
        is_own = self.cfg.source == "trainer"
        return _replaced(
            groups,
            [
                replace(
                    s,
                    old_logp=old_R,
                    ref_logp=ref_R,
                    old_entropy=entropies.get((s.order, s.member)),
                    logp_version=version if is_own else s.policy_version,
                )
                for s, old_R, ref_R in zip(samples, old, reference, strict=True)
            ],
        )

    def _entropies(self, samples: Sequence[Sample]) -> dict[tuple[int, int], Floats]:
        """Return the entropies of the samples with forced tokens by (order, member), if the objective reads them."""
        if not self.reads_entropy:
            return {}
        forced = [sample for sample in samples if sample.num_forced_tokens]
        with self.timings.measure("old_log_prob"):
            found = self.policy.entropies(forced)
        return {(s.order, s.member): entropy_R for s, entropy_R in zip(forced, found, strict=True)}

    def _check_servers(self, samples: Sequence[Sample]) -> None:
        """Compute the trainer's log-probs of each replica's oldest group, and count the error of the servers'."""
        group = _oldest(samples)
        for sample, logp in zip(group, self.policy.logprobs(group), strict=True):
            tally_logprob_error(self.tally, logp - _server_logp(sample))

    def _measure_replay(self, samples: Sequence[Sample]) -> None:
        """Compute log-probs of each replica's oldest group with replay and without, and count their gaps to the
        servers'."""
        group = _oldest(samples)
        for name, logps in (
            ("replay", self.policy.logprobs(group)),
            ("own_choice", self.policy.own_choice_logprobs(group)),
        ):
            for sample, logp in zip(group, logps, strict=True):
                tally_gap(self.tally, name, (logp - _server_logp(sample))[sample.num_forced_tokens :])


def _oldest(samples: Sequence[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.order == samples[0].order]


def _server_logp(sample: Sample) -> Floats:
    if sample.rollout_logp is None:
        raise RuntimeError(f"the rollout of draw {sample.order} has no log-probs of its server")
    return np.asarray(sample.rollout_logp, np.float32)


def _replaced(groups: Sequence[Group], samples: Iterable[Sample]) -> list[Group]:
    """Return the groups with ``samples`` in place of the members that they are copies of."""
    by_member = {(sample.order, sample.member): sample for sample in samples}
    return [[by_member.get((sample.order, sample.member), sample) for sample in group] for group in groups]
