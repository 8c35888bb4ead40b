"""Sums that become a step's metrics. Every leader counts; the sums are added over leaders and divided once at the
end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from megatron_dypo.refit.servers import RefitReport
from megatron_dypo.rollout.collect import DroppedGroup
from megatron_dypo.rollout.counts import ClientCounts
from megatron_dypo.types import Floats, GradedGroup, Sample


class Tally(dict[str, float]):
    """Named sums. Keys ``max:`` and ``min:`` keep an extreme instead. Missing sums are 0."""

    def __missing__(self, key: str) -> float:
        return 0.0

    def take(self) -> Tally:
        """Return the sums since the last call; they start again at zero."""
        taken = Tally(self)
        self.clear()
        return taken

    def merge(self, other: Tally) -> None:
        """Add the sums of another leader."""
        for key, value in other.items():
            if key.startswith(("max:", "min:")):
                self.extreme(key, value)
            else:
                self.add(key, value)

    def extreme(self, key: str, value: float) -> None:
        """Keep the largest (``max:``) or smallest (``min:``) value seen under ``key``."""
        choose = max if key.startswith("max:") else min
        self[key] = choose(self[key], value) if key in self else value

    def add(self, key: str, value: float = 1.0) -> None:
        self[key] += value

    def ratio(self, numerator: str, denominator: str) -> float | None:
        """Return one sum divided by another; None if the divisor is 0."""
        return self[numerator] / self[denominator] if self[denominator] else None


def tally_client(tally: Tally, counts: ClientCounts) -> None:
    """Count failures while groups were collected. :func:`tally_dropped` counts the prompts without a group."""
    for name in ("retries", "wrong_versions", "dropped_rollouts", "dropped_tokens"):
        tally.add(name, getattr(counts, name))
    tally.extreme("max:dropped_longest", counts.dropped_longest)


def tally_dropped(tally: Tally, dropped: Iterable[DroppedGroup]) -> None:
    """Count prompts that have no group."""
    for group in dropped:
        tally.add("asked")
        tally.add(f"dropped/{group.reason.value}")


def tally_refit(tally: Tally, report: RefitReport) -> None:
    """Count the servers that one refit lost and got back; call this on one rank."""
    tally.add("refit/fenced", report.fenced)
    tally.add("refit/rejoined", report.rejoined)
    tally.add("refit/retries", report.retries)


def tally_groups(tally: Tally, groups: Iterable[GradedGroup]) -> None:
    """Count tiers, verdicts and lengths of graded groups. Rollouts without a verdict count as neither right nor
    wrong."""
    for group in groups:
        tally.add("groups")
        tally.add("prompt_tokens", len(group.prompt.tokens))
        if group.tier is not None:
            tally.add(f"tier/{group.tier.value}")
            tally.add("graded")
        elif group.rollouts:
            tally.add("without_verdict")
        if group.rollouts:
            tally.add("asked")
        for rollout, verdict in zip(group.rollouts, group.verdicts, strict=True):
            tally.add("rollouts")
            tally.add("truncated", rollout.finish == "length")
            tally.add("rollout_tokens", len(rollout.tokens))
            tally.add("sampled_tokens", len(rollout.tokens) - rollout.num_forced_tokens)
            tally.extreme("max:response_len", len(rollout.tokens))
            tally.extreme("min:response_len", len(rollout.tokens))
            tally.add("rollout_version", rollout.policy_version)
            if verdict.error is not None:
                tally.add("verifier_errors")
                continue
            tally.add("verdicts")
            tally.add("reward", verdict.reward)
            tally.add("correct", verdict.is_correct)


def tally_sums(tally: Tally, sums: Mapping[str, float]) -> None:
    """Count one group's share of the objective's sums."""
    for name, value in sums.items():
        tally.add(f"sum/{name}", value)


def tally_logprob_error(tally: Tally, error: Floats) -> None:
    """Count one rollout's ``error``: [R] log-probs of the trainer minus those of the servers."""
    tally.add("logprob_error/rollouts")
    tally.add("logprob_error/tokens", len(error))
    tally.add("logprob_error/mean", float(abs(error).sum(dtype="float64")))
    tally.add("logprob_error/sequence", abs(float(error.sum(dtype="float64"))))
    tally.extreme("max:logprob_error", float(abs(error).max(initial=0.0)))


def tally_gap(tally: Tally, name: str, gap: Floats) -> None:
    """Count one rollout's [R] difference of log-probs under ``gap/<name>``."""
    tally.add(f"gap/{name}", float(abs(gap).sum(dtype="float64")))
    tally.add(f"gap/{name}/tokens", len(gap))


def tally_update(tally: Tally, samples: Sequence[Sample], version: int, *, old_is_rollout: bool = False) -> None:
    """Count the sequences of an update.

    Args:
        old_is_rollout: ``old_logp`` are the servers' own, so there is no mismatch to measure.
    """
    for sample in samples:
        tally.add("sequences")
        tally.add("tokens", len(sample.tokens))
        tally.add("response_tokens", sample.num_response_tokens)
        tally.add("staleness", version - sample.policy_version)
        if old_is_rollout or sample.old_logp is None or sample.rollout_logp is None:
            continue
        gap = (sample.old_logp - sample.rollout_logp)[sample.num_forced_tokens :]
        if len(gap):
            tally.extreme("max:mismatch", float(abs(gap).max()))


def tally_work(tally: Tally, flops: float, model_flops: float = 0.0) -> None:
    """Count the work of one replica's update (see ``models.flops``), and that without recomputation."""
    tally.add("replicas")
    tally.add("model_flops", model_flops)
    tally.add("flops", flops)
    tally.extreme("max:flops", flops)
