"""Sums that become a step's metrics: counted on every replica's leader, added over leaders, divided once at the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from megatron_dypo.metrics.names import name_part
from megatron_dypo.objective.metrics import SumMetric, sum_metrics
from megatron_dypo.parallel.device import peak_memory_gib
from megatron_dypo.refit.servers import RefitReport
from megatron_dypo.rollout.collect import DroppedGroup
from megatron_dypo.rollout.counts import ClientCounts
from megatron_dypo.types import Floats, GradedGroup, Sample, SampleKind, Totals


class Tally(dict[str, float]):
    """Named sums; ``max:`` and ``min:`` keys keep an extreme instead. Missing ones are 0."""

    def __missing__(self, key: str) -> float:
        return 0.0

    def take(self) -> Tally:
        """Return the sums since the last call; they start again at zero."""
        taken = Tally(self)
        self.clear()
        return taken

    def merge(self, other: Tally) -> None:
        """Add what another leader counted."""
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
        """Return one sum over another; None where there is nothing to divide by."""
        return self[numerator] / self[denominator] if self[denominator] else None


def tally_client(tally: Tally, counts: ClientCounts) -> None:
    """Count what went wrong while groups were collected; :func:`tally_dropped` counts the prompts without a group."""
    for name in ("retries", "wrong_versions", "dropped_rollouts", "dropped_tokens"):
        tally.add(name, getattr(counts, name))
    tally.extreme("max:dropped_longest", counts.dropped_longest)


def tally_dropped(tally: Tally, dropped: Iterable[DroppedGroup]) -> None:
    """Count prompts that have no group."""
    for group in dropped:
        tally.add("asked")
        tally.add(f"dropped/{group.reason.value}")


def tally_refit(tally: Tally, report: RefitReport) -> None:
    """Count the servers that one refit lost and won; call this on one rank."""
    tally.add("refit/fenced", report.fenced)
    tally.add("refit/rejoined", report.rejoined)
    tally.add("refit/retries", report.retries)


def tally_groups(tally: Tally, groups: Iterable[GradedGroup]) -> None:
    """Count tiers, verdicts and lengths of graded groups. A rollout without a verdict is neither right nor wrong."""
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
            tally.add("sampled_tokens", len(rollout.tokens))
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
    """Count one rollout's ``error``: [R] log-probs of the trainer less those of the servers."""
    tally.add("logprob_error/rollouts")
    tally.add("logprob_error/tokens", len(error))
    tally.add("logprob_error/mean", float(abs(error).sum(dtype="float64")))
    tally.add("logprob_error/sequence", abs(float(error.sum(dtype="float64"))))
    tally.extreme("max:logprob_error", float(abs(error).max(initial=0.0)))


def tally_update(tally: Tally, samples: Sequence[Sample], version: int, *, old_is_rollout: bool = False) -> None:
    """Count the sequences of an update.

    Args:
        old_is_rollout: ``old_logp`` are the servers' own, so that they say nothing of a mismatch.
    """
    for sample in samples:
        tally.add("sequences")
        tally.add("tokens", len(sample.tokens))
        tally.add("response_tokens", sample.num_response_tokens)
        tally.add("staleness", version - sample.policy_version)
        if old_is_rollout or sample.old_logp is None or sample.rollout_logp is None:
            continue
        if len(sample.old_logp):
            tally.extreme("max:mismatch", float(abs(sample.old_logp - sample.rollout_logp).max()))


def tally_work(tally: Tally, flops: float) -> None:
    """Count the work of one replica's update (see ``batching.flops``)."""
    tally.add("replicas")
    tally.add("flops", flops)
    tally.extreme("max:flops", flops)


def rollout_metrics(tally: Tally) -> dict[str, float]:
    """Return the metrics of collection and grading. A mean over nothing is left out; a count of nothing is 0."""
    metrics: dict[str, float | None] = {
        "data/dropped_prompts": tally["dropped_prompts"],
        "data/dropped_traces": tally["dropped_traces"],
        "data/wrong_traces": tally["wrong_traces"],
        "gate/hard_without_teacher": tally["hard_without_teacher"],
        "queue/stale": tally["stale"],
        "queue/distill": tally["queue/distill"],
        "queue/reinforce": tally["queue/reinforce"],
        "queue/mix": tally["queue/mix"],
    }
    metrics |= {name: count for name, count in tally.items() if name.startswith("refit/")}
    if "max:epoch" in tally:
        metrics["data/epoch"] = tally["max:epoch"]
    metrics |= {
        "old_logp/server_error/mean": tally.ratio("logprob_error/mean", "logprob_error/tokens"),
        "old_logp/server_error/max": tally.get("max:logprob_error"),
        "old_logp/server_error/sequence": tally.ratio("logprob_error/sequence", "logprob_error/rollouts"),
    }
    metrics |= {f"gate/{tier}": tally.ratio(f"tier/{tier}", "graded") for tier in ("easy", "mid", "hard")}
    if tally["asked"]:
        metrics |= _collection_metrics(tally)
    return {name: float(value) for name, value in metrics.items() if value is not None}


def _collection_metrics(tally: Tally) -> dict[str, float | None]:
    """Return the metrics of a step that asked servers."""
    return {
        "rollout/reward": tally.ratio("reward", "verdicts"),
        "rollout/accuracy": tally.ratio("correct", "verdicts"),
        "rollout/truncated_ratio": tally.ratio("truncated", "rollouts"),
        "rollout/response_len/mean": tally.ratio("sampled_tokens", "rollouts"),
        "rollout/response_len/max": tally.get("max:response_len"),
        "rollout/response_len/min": tally.get("min:response_len"),
        "rollout/prompt_len/mean": tally.ratio("prompt_tokens", "groups"),
        "rollout/num_prompts": tally["groups"],
        "rollout/num_rollouts": tally["rollouts"],
        "rollout/num_tokens": tally["sampled_tokens"],
        "rollout/num_rounds": tally["max:rounds"],
        "rollout/retries": tally["retries"],
        "rollout/incomplete_groups": tally["dropped/incomplete"],
        "rollout/refused_prompts": tally["dropped/refused"],
        "rollout/wrong_versions": tally["wrong_versions"],
        "rollout/dropped_rollouts": tally["dropped_rollouts"],
        "rollout/dropped_tokens": tally["dropped_tokens"],
        "rollout/dropped_longest": tally["max:dropped_longest"],
        "rollout/verifier_errors": tally["verifier_errors"],
        "rollout/groups_without_verdict": tally["without_verdict"],
        "rollout/groups_without_teacher_logp": tally["without_teacher_logp"] if tally["teacher_asked"] else None,
        "rollout/policy_version": tally.ratio("rollout_version", "rollouts"),
    }


def update_metrics(
    tally: Tally, totals: Totals, sums: Mapping[str, float], declared: Iterable[SumMetric]
) -> dict[str, float]:
    """Return the metrics of an update.

    Args:
        sums: those of the loss over all ranks; the groups' are in ``tally``.
        declared: the objective's own metrics.
    """
    traces, tokens = totals.num_sequences[SampleKind.TRACE], totals.num_response_tokens
    of_groups = {key.removeprefix("sum/"): value for key, value in tally.items() if key.startswith("sum/")}
    metrics: dict[str, float | None] = {
        "train/num_prompts": totals.num_prompts,
        "train/num_sequences": tally["sequences"],
        "train/num_tokens": tally["tokens"],
        "train/num_response_tokens": tally["response_tokens"],
        "train/staleness": tally.ratio("staleness", "sequences"),
        "gate/offline_share_prompts": traces / totals.num_prompts,
        "gate/offline_share_sequences": traces / sum(totals.num_sequences.values()),
        "gate/offline_share_tokens": tokens[SampleKind.TRACE] / max(sum(tokens.values()), 1),
        **sum_metrics(declared, {n: sums.get(n, 0.0) + of_groups.get(n, 0.0) for n in {**sums, **of_groups}}),
    }
    if tally["flops"]:
        metrics["train/flops_imbalance"] = tally["max:flops"] * tally["replicas"] / tally["flops"] - 1
    if "max:mismatch" in tally:
        metrics["train/train_rollout_logprob_abs_diff"] = sums["mismatch_abs"] / sums["rollout_tokens"]
        metrics["train/train_rollout_logprob_abs_diff_max"] = tally["max:mismatch"]
    for key in [key for key in tally if key.startswith("teacher/")]:
        metrics[f"teacher/{name_part(key.removeprefix('teacher/'))}/share"] = tally.ratio(key, "teachers")
    return {name: float(value) for name, value in metrics.items() if value is not None}


def step_metrics(
    tally: Tally,
    timings: dict[str, float],
    totals: Totals,
    sums: Mapping[str, float],
    declared: Iterable[SumMetric],
    world_size: int,
) -> dict[str, float]:
    """Return the metrics of one step: of its collection, its update, its time and its memory."""
    return {
        **rollout_metrics(tally),
        **update_metrics(tally, totals, sums, declared),
        **timings,
        **performance_metrics(tally, timings, world_size),
        "perf/peak_memory_gib": peak_memory_gib(),
    }


def performance_metrics(tally: Tally, timings: dict[str, float], world_size: int) -> dict[str, float]:
    """Return the rates of one step; ``timings`` are those of ``Timings.take``."""
    step, gen, update = (timings.get(f"timing_s/{part}", 0.0) for part in ("step", "gen", "update_actor"))
    metrics = {}
    if step:
        metrics["perf/tokens_per_sec"] = tally["tokens"] / step
        metrics["perf/tokens_per_gpu_per_sec"] = tally["tokens"] / step / world_size
        metrics["perf/wait_time_ratio"] = gen / step
    if gen:
        metrics["perf/rollout_tokens_per_sec"] = tally["sampled_tokens"] / gen
    if update:
        metrics["perf/update_tokens_per_sec"] = tally["tokens"] / update
    return metrics
