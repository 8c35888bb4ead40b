"""The metrics of a step, computed from the sums counted in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from megatron_dypo.loop.books.tally import Tally
from megatron_dypo.metrics.names import name_part
from megatron_dypo.objective.metrics import SumMetric, sum_metrics
from megatron_dypo.parallel.device import device_name, peak_memory_gib
from megatron_dypo.planning.devices import find_rates
from megatron_dypo.types import SampleKind, Totals


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
        "queue/buffer": tally["queue/buffer"] or None,
    }
    metrics |= {name: count for name, count in tally.items() if name.startswith("refit/")}
    if "max:epoch" in tally:
        metrics["data/epoch"] = tally["max:epoch"]
    metrics |= {
        "old_logp/server_error/mean": tally.ratio("logprob_error/mean", "logprob_error/tokens"),
        "old_logp/server_error/max": tally.get("max:logprob_error"),
        "old_logp/server_error/sequence": tally.ratio("logprob_error/sequence", "logprob_error/rollouts"),
        "train/replay/logprob_gap": tally.ratio("gap/replay", "gap/replay/tokens"),
        "train/replay/logprob_gap_own_choice": tally.ratio("gap/own_choice", "gap/own_choice/tokens"),
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
        "rollout/response_len/mean": tally.ratio("rollout_tokens", "rollouts"),
        "rollout/response_len/max": tally.get("max:response_len"),
        "rollout/response_len/min": tally.get("min:response_len"),
        "rollout/prompt_len/mean": tally.ratio("prompt_tokens", "groups"),
        "rollout/num_prompts": tally["groups"],
        "rollout/num_rollouts": tally["rollouts"],
        "rollout/num_tokens": tally["sampled_tokens"],
        "rollout/num_from_journal": tally["from_journal"],
        "rollout/num_rounds": tally["max:rounds"],
        "rollout/retries": tally["retries"],
        "rollout/incomplete_groups": tally["dropped/incomplete"],
        "rollout/refused_prompts": tally["dropped/refused"],
        "rollout/wrong_versions": tally["wrong_versions"],
        "rollout/dropped_rollouts": tally["dropped_rollouts"],
        "rollout/dropped_tokens": tally["dropped_tokens"],
        "rollout/dropped_longest": tally["max:dropped_longest"],
        "rollout/verifier_errors": tally["verifier_errors"],
        "rollout/verifiers_replaced": tally["verifiers_replaced"],
        "rollout/groups_without_verdict": tally["without_verdict"],
        "rollout/groups_without_teacher_logp": tally["without_teacher_logp"] if tally["teacher_asked"] else None,
        "rollout/policy_version": tally.ratio("rollout_version", "rollouts"),
    }


def update_metrics(
    tally: Tally, totals: Totals, sums: Mapping[str, float], declared: Iterable[SumMetric]
) -> dict[str, float]:
    """Return the metrics of an update.

    Args:
        sums: sums of the loss over all ranks. The sums of the groups are in ``tally``.
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
    if "max:rolled_back_to" in tally:
        metrics["train/rolled_back_to"] = tally["max:rolled_back_to"]
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
    """Return the metrics of one step: collection, update, time and memory."""
    gpu = find_rates(device_name())
    return {
        **rollout_metrics(tally),
        **update_metrics(tally, totals, sums, declared),
        **timings,
        **performance_metrics(tally, timings, world_size, rate=gpu.bf16 if gpu else None),
        "perf/peak_memory_gib": peak_memory_gib(),
    }


def performance_metrics(
    tally: Tally, timings: dict[str, float], world_size: int, rate: float | None = None
) -> dict[str, float]:
    """Return the rates of one step; ``timings`` come from ``Timings.take``.

    Args:
        rate: FLOP/s of one rank's GPU in bf16, according to its data sheet; None: not known, and there is no MFU.
    """
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
    if update and rate and tally["model_flops"]:
        metrics["perf/mfu"] = tally["model_flops"] / update / (world_size * rate)
    return metrics
