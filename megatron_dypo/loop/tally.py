"""Sums that become a step's metrics: counted on every replica's leader, added over leaders, divided once at the end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from megatron_dypo.metrics.names import name_part
from megatron_dypo.objective.gal import GalStatistics
from megatron_dypo.objective.loss import STATISTICS
from megatron_dypo.refit.servers import RefitReport
from megatron_dypo.rollout.collect import DroppedGroup
from megatron_dypo.rollout.counts import ClientCounts
from megatron_dypo.types import Floats, GradedGroup, Sample, Totals, Treatment


class Tally(dict[str, float]):
    """Named sums; ``max:`` and ``min:`` keys keep an extreme instead. Missing ones are 0."""

    def __missing__(self, key: str) -> float:
        return 0.0

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
        """One sum over another; None where there is nothing to divide by, which is no number."""
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


def tally_push(tally: Tally, pushed: RefitReport) -> None:
    """Count the servers that one push lost and won; to be called on one rank."""
    tally.add("refit/fenced", pushed.fenced)
    tally.add("refit/rejoined", pushed.rejoined)
    tally.add("refit/retries", pushed.retries)


def tally_groups(tally: Tally, groups: Iterable[GradedGroup]) -> None:
    """Count tiers, verdicts and lengths of freshly graded groups. A rollout without a verdict is neither right nor wrong."""
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


def tally_gal(tally: Tally, statistics: GalStatistics, log_ratio_sum: float, num_members: int) -> None:
    """Count the diagnostics of one Mid group."""
    tally.add("gal_groups")
    for name in ("loss", "eta", "saturation", "margin"):
        tally.add(f"gal/{name}", getattr(statistics, name))
    tally.add("gal_log_ratio", log_ratio_sum)
    tally.add("gal_members", num_members)


def tally_score_error(tally: Tally, error: Floats) -> None:
    """Count one rollout's [R] trainer's less servers' log-probs."""
    tally.add("score_error/rollouts")
    tally.add("score_error/tokens", len(error))
    tally.add("score_error/mean", float(abs(error).sum(dtype="float64")))
    tally.add("score_error/sequence", abs(float(error.sum(dtype="float64"))))
    tally.extreme("max:score_error", float(abs(error).max(initial=0.0)))


def tally_update(tally: Tally, samples: Sequence[Sample], version: int, *, old_is_rollout: bool = False) -> None:
    """Count the sequences of an update where they are scored.

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
    """What collection and grading counted. A mean over nothing is left out; a count of nothing is 0."""
    metrics: dict[str, float | None] = {
        "data/dropped_prompts": tally["dropped_prompts"],
        "data/dropped_traces": tally["dropped_traces"],
        "data/wrong_traces": tally["wrong_traces"],
        "gate/hard_without_teacher": tally["hard_without_teacher"],
        "queue/stale": tally["stale"],
        "queue/distil": tally["queue/distil"],
        "queue/reinforce": tally["queue/reinforce"],
    }
    metrics |= {name: count for name, count in tally.items() if name.startswith("refit/")}
    if "max:epoch" in tally:
        metrics["data/epoch"] = tally["max:epoch"]
    metrics |= {
        "score/rollout_policy_error/mean": tally.ratio("score_error/mean", "score_error/tokens"),
        "score/rollout_policy_error/max": tally.get("max:score_error"),
        "score/rollout_policy_error/sequence": tally.ratio("score_error/sequence", "score_error/rollouts"),
    }
    metrics |= {f"gate/{tier}": tally.ratio(f"tier/{tier}", "graded") for tier in ("easy", "mid", "hard")}
    if tally["asked"]:
        metrics |= _collection_metrics(tally)
    return {name: float(value) for name, value in metrics.items() if value is not None}


def _collection_metrics(tally: Tally) -> dict[str, float | None]:
    """Of a step that asked servers."""
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
        "rollout/policy_version": tally.ratio("rollout_version", "rollouts"),
    }


def update_metrics(tally: Tally, totals: Totals, sums: Tensor) -> dict[str, float]:
    """What the update counted; ``sums`` are those of :func:`token_loss` ([len(STATISTICS)]) over all ranks."""
    total = dict(zip(STATISTICS, sums.tolist(), strict=True))
    distil, reinforce = (totals.num_sequences[t] for t in (Treatment.DISTIL, Treatment.REINFORCE))
    tokens = totals.num_response_tokens
    all_tokens = max(sum(tokens.values()), 1)
    metrics: dict[str, float | None] = {
        "train/loss": total["surrogate"] + total["kl"] + total["sft"] + tally["gal_loss_share"],
        "train/num_prompts": totals.num_prompts,
        "train/num_sequences": tally["sequences"],
        "train/num_tokens": tally["tokens"],
        "train/num_response_tokens": tally["response_tokens"],
        "train/staleness": tally.ratio("staleness", "sequences"),
        "gate/offline_share_prompts": distil / totals.num_prompts,
        "gate/offline_share_sequences": distil / (distil + reinforce),
        "gate/offline_share_tokens": tokens[Treatment.DISTIL] / all_tokens,
    }
    if tally["flops"]:
        metrics["train/flops_imbalance"] = tally["max:flops"] * tally["replicas"] / tally["flops"] - 1
    if total["rollout_tokens"]:
        metrics |= _rollout_token_metrics(total)
    if "max:mismatch" in tally:
        metrics["train/train_rollout_logprob_abs_diff"] = total["mismatch_abs"] / total["rollout_tokens"]
        metrics["train/train_rollout_logprob_abs_diff_max"] = tally["max:mismatch"]
    if total["tokens"] > total["rollout_tokens"]:
        metrics["train/sft_loss"] = total["sft"]
        metrics["train/sft_nll"] = total["trace_nll"] / (total["tokens"] - total["rollout_tokens"])
    if tally["gal_groups"]:
        metrics |= {f"gal/{n}": tally.ratio(f"gal/{n}", "gal_groups") for n in ("loss", "eta", "saturation", "margin")}
        metrics["gal/log_ratio"] = tally.ratio("gal_log_ratio", "gal_members")
    if total["anchored_tokens"]:
        metrics["gal/anchor_drift"] = total["anchor_drift"] / total["anchored"]
        metrics["gal/clipfrac"] = total["anchored_clipped"] / total["anchored_tokens"]
    for key in [key for key in tally if key.startswith("teacher/")]:
        metrics[f"teacher/{name_part(key.removeprefix('teacher/'))}/share"] = tally.ratio(key, "teachers")
    return {name: float(value) for name, value in metrics.items() if value is not None}


def _rollout_token_metrics(total: dict[str, float]) -> dict[str, float]:
    tokens = total["rollout_tokens"]
    return {
        "train/pg_loss": total["surrogate"],
        "train/kl_loss": total["kl"],
        "train/entropy": total["entropy"] / tokens,
        "train/pg_clipfrac": total["clipped"] / tokens,
        "train/ppo_kl": total["ppo_kl"] / tokens,
        "train/importance_capped_ratio": total["importance_capped"] / tokens,
        "train/importance_masked_ratio": total["importance_masked"] / tokens,
        "train/importance_masked_rollouts_ratio": total["rollouts_masked"] / total["rollouts"],
    }


def performance_metrics(tally: Tally, timings: dict[str, float], world_size: int) -> dict[str, float]:
    """Rates of one step; ``timings`` are those of ``Timings.take``."""
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
