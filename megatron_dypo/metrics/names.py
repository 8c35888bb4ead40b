"""The metrics that the trainer writes: name, unit and meaning of each. An objective adds its own (``SumMetric``).

Names use the common prefixes of dashboards (``train/``, ``rollout/``, ``timing_s/``, ``perf/``, ``eval/``).
A part in angle brackets, as in ``eval/<set>/accuracy``, stands for any text without a slash.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One row of a table of metrics."""

    name: str
    unit: str
    """Empty for a pure number."""
    meaning: str
    panel: str = ""
    """Title of the report's panel that shows it, if no panel of the report's own table does."""


METRICS: tuple[Metric, ...] = (
    Metric("train/skipped", "", "1 where the update was skipped because its gradients were not finite, else 0"),
    Metric(
        "train/rolled_back_to",
        "step",
        "checkpoint to which weights and optimizer went back after the update or before the last save, if any",
    ),
    Metric("train/grad_norm", "", "global gradient norm before clipping"),
    Metric(
        "train/load_balancing_loss", "", "experts: mean over layers, 1 under perfect balance; without its coefficient"
    ),
    Metric(
        "train/replay/route_difference",
        "fraction",
        "replay: tokens and layers of the update for which the router would have chosen other experts",
    ),
    Metric(
        "train/replay/route_difference_old",
        "fraction",
        "the same in the passes before the update, for log π_old",
    ),
    Metric(
        "train/replay/logprob_gap",
        "nats/token",
        "replay: mean |log π_trainer − log π_server| of the oldest group, with the servers' experts",
    ),
    Metric(
        "train/replay/logprob_gap_own_choice",
        "nats/token",
        "the same with the experts that the trainer's routers choose",
    ),
    Metric("train/lr", "", "learning rate of this update"),
    Metric("train/train_rollout_logprob_abs_diff", "nats/token", "mean |log π_trainer − log π_server| of rollouts"),
    Metric("train/train_rollout_logprob_abs_diff_max", "nats", "the largest such difference"),
    Metric("train/num_prompts", "prompts", "prompts in this update"),
    Metric("train/num_sequences", "sequences", "sequences in this update"),
    Metric("train/num_tokens", "tokens", "tokens in this update, prompts included"),
    Metric("train/num_response_tokens", "tokens", "tokens in this update that enter the loss"),
    Metric("train/num_microbatches", "microbatches", "microbatches of this update on one data-parallel rank"),
    Metric("train/padding_ratio", "fraction", "positions of the microbatches that are padding"),
    Metric(
        "train/flops_imbalance",
        "fraction",
        "largest FLOPs of a replica in the update, divided by the mean, minus 1",
    ),
    Metric("train/staleness", "versions", "mean age of the weights that made this update's samples"),
    Metric("rollout/reward", "", "mean shaped reward of the rollouts that have a verdict"),
    Metric("rollout/accuracy", "fraction", "correct rollouts among those with a verdict"),
    Metric("rollout/truncated_ratio", "fraction", "rollouts that hit the response limit"),
    Metric("rollout/response_len/mean", "tokens", "mean length of the responses"),
    Metric("rollout/response_len/max", "tokens", "longest response"),
    Metric("rollout/response_len/min", "tokens", "shortest response"),
    Metric("rollout/prompt_len/mean", "tokens", "mean length of the prompts"),
    Metric("rollout/num_prompts", "prompts", "prompts whose group is complete"),
    Metric("rollout/num_rollouts", "rollouts", "rollouts of complete groups"),
    Metric("rollout/num_tokens", "tokens", "sampled tokens"),
    Metric("rollout/num_from_journal", "prompts", "prompts whose group a resumed run took from the journal"),
    Metric("rollout/num_rounds", "rounds", "rounds of collection until the queues held an update"),
    Metric("rollout/retries", "requests", "requests sent again after an error"),
    Metric("rollout/incomplete_groups", "prompts", "prompts dropped because their group stayed incomplete"),
    Metric("rollout/refused_prompts", "prompts", "prompts dropped because a server refused the request for good"),
    Metric("rollout/groups_without_verdict", "prompts", "prompts dropped because a rollout of theirs has no verdict"),
    Metric(
        "rollout/groups_without_teacher_logp", "prompts", "prompts dropped because the teacher gave no log-probs of one"
    ),
    Metric(
        "rollout/wrong_versions",
        "rollouts",
        "rollouts dropped because weights of a wrong version sampled them",
    ),
    Metric("rollout/dropped_rollouts", "rollouts", "responses that were sampled and thrown away with their group"),
    Metric("rollout/dropped_tokens", "tokens", "tokens of these responses"),
    Metric("rollout/dropped_longest", "tokens", "longest of these; above the mean, long ones are lost more often"),
    Metric("rollout/verifier_errors", "rollouts", "rollouts whose verifier raised or missed its deadline"),
    Metric("rollout/verifiers_replaced", "processes", "verifier processes that died or were ended at their deadline"),
    Metric("rollout/policy_version", "", "version of the weights that sampled"),
    Metric("data/epoch", "epochs", "passes over the prompts that are complete"),
    Metric("data/dropped_prompts", "prompts", "prompts over the length limit"),
    Metric("data/dropped_traces", "traces", "teachers' traces over the length limit"),
    Metric("data/wrong_traces", "traces", "teachers' traces left out because the verifier calls them wrong"),
    Metric("ledger/drawn", "prompts", "draws of prompts since the run began: the sum of all accounts below"),
    Metric("ledger/trained_rl", "prompts", "draws trained on with their own rollouts"),
    Metric("ledger/trained_sft", "prompts", "draws trained on with a teacher's trace"),
    Metric("ledger/trained_mix", "prompts", "draws trained on with their own rollouts and a trace together"),
    Metric("ledger/dropped_easy", "prompts", "draws dropped as Easy"),
    Metric("ledger/dropped_no_teacher", "prompts", "draws to be distilled that have no trace"),
    Metric("ledger/dropped_too_long", "prompts", "draws longer than data.max_prompt_tokens"),
    Metric("ledger/dropped_incomplete", "prompts", "draws whose group stayed incomplete"),
    Metric("ledger/dropped_refused", "prompts", "draws that a server refused for good"),
    Metric("ledger/dropped_no_verdict", "prompts", "draws with a rollout that the verifier failed on"),
    Metric("ledger/dropped_no_teacher_logp", "prompts", "draws with a rollout that the teacher gave no log-probs of"),
    Metric("ledger/dropped_stale", "prompts", "draws that waited for longer than batching.max_staleness"),
    Metric("ledger/waiting", "prompts", "draws that wait for an update, or for their last one"),
    Metric("ledger/in_flight", "prompts", "draws that are being sampled or graded, or are the first after a resume"),
    Metric("gate/easy", "fraction", "graded prompts with every rollout correct"),
    Metric("gate/mid", "fraction", "graded prompts with some rollouts correct"),
    Metric("gate/hard", "fraction", "graded prompts with no rollout correct"),
    Metric("gate/offline_share_prompts", "fraction", "prompts of the update that learn from a teacher"),
    Metric("gate/offline_share_sequences", "fraction", "sequences of the update that are teachers' traces"),
    Metric("gate/offline_share_tokens", "fraction", "response tokens of the update that are teachers'"),
    Metric("gate/hard_without_teacher", "prompts", "prompts skipped because they need a trace and have none"),
    Metric("queue/distill", "prompts", "prompts that wait in the queue of teachers' traces after the update"),
    Metric("queue/reinforce", "prompts", "prompts that wait in the queue of rollout groups after the update"),
    Metric("queue/mix", "prompts", "prompts that wait in the queue of rollout groups with a trace after the update"),
    Metric("queue/buffer", "prompts", "teachers' traces in the buffer, if any: they wait for an update of their own"),
    Metric("queue/stale", "prompts", "prompts dropped because they waited for too many versions"),
    Metric("old_logp/server_error/mean", "nats/token", "mean |log π_trainer − log π_server| of the groups checked"),
    Metric("old_logp/server_error/max", "nats", "the largest such difference"),
    Metric("old_logp/server_error/sequence", "nats", "mean |difference of a whole rollout's log-prob|"),
    Metric("teacher/<name>/share", "fraction", "traces of the update drawn from this teacher"),
    Metric("refit/seconds", "s", "the step's last refit, from its first control call to its last"),
    Metric("refit/pause_s", "s", "the part of that refit in which servers were paused"),
    Metric(
        "refit/bytes",
        "bytes",
        "bytes that the trainer sent in it: to each server (p2p, local), or once for all servers (broadcast, disk)",
    ),
    Metric("refit/fenced", "servers", "servers that refits since the last update found lost, and fenced"),
    Metric("refit/rejoined", "servers", "fenced servers that answered again and got the weights"),
    Metric("refit/retries", "attempts", "attempts of refits after the first, without the servers just fenced"),
    Metric("timing_s/gen", "s", "rollouts"),
    Metric("timing_s/reward", "s", "grading"),
    Metric("timing_s/old_log_prob", "s", "forward-only passes for log π_old"),
    Metric("timing_s/ref_log_prob", "s", "forward-only passes for log π_ref"),
    Metric("timing_s/teacher_log_prob", "s", "requests for a teacher's log-probs of rollouts"),
    Metric("timing_s/update_actor", "s", "forward, backward and optimizer"),
    Metric("timing_s/refit", "s", "refit: sending the new weights to the servers"),
    Metric("timing_s/save_checkpoint", "s", "checkpoint"),
    Metric("timing_s/eval", "s", "held-out evaluation"),
    Metric("timing_s/probe", "s", "probe: rollouts, log-probs and scores (probe.every)"),
    Metric("timing_s/step", "s", "the whole step"),
    Metric("timing_s/other", "s", "the step minus every part above"),
    Metric("perf/tokens_per_sec", "tokens/s", "tokens of the update divided by the step's time"),
    Metric("perf/tokens_per_gpu_per_sec", "tokens/s", "the same for each training process"),
    Metric("perf/rollout_tokens_per_sec", "tokens/s", "sampled tokens divided by the time of the rollouts"),
    Metric("perf/update_tokens_per_sec", "tokens/s", "tokens of the update / time of forward and backward"),
    Metric(
        "perf/mfu",
        "fraction",
        "FLOPs of the update without recomputation / time of forward, backward and optimizer / bf16 rate of the GPUs",
    ),
    Metric(
        "perf/exposed_communication_ratio",
        "fraction",
        "share of a profiled step in which rank 0's GPU communicates and computes nothing (profile.tool: torch)",
    ),
    Metric("perf/wait_time_ratio", "fraction", "share of the step in which the trainer waits for rollouts"),
    Metric("perf/overhead_ratio", "fraction", "timing_s/other over timing_s/step"),
    Metric("perf/clock_step_s", "s", "how far the first rank's clock was set ahead since the last update (< 0: back)"),
    Metric("perf/slowest_rank", "", "rank whose forward and backward took longest; the others wait for it"),
    Metric("perf/slowest_rank_excess", "fraction", "its time divided by the median rank's, minus 1"),
    Metric("perf/rank_wait_ratio", "fraction", "share of forward and backward in which the mean rank waits for it"),
    Metric("perf/peak_memory_gib", "GiB", "largest memory of a training process"),
    Metric("probe/seconds", "s", "the whole probe (docs/probe.md)"),
    Metric("probe/var_grpo", "", "variance of one Mid prompt's gradient of L_GRPO"),
    Metric("probe/var_gal", "", "the same of L_GAL"),
    Metric("probe/covariance", "", "covariance of the two, which the paper drops"),
    Metric("probe/snr_mix", "", "|mean|² / variance of one Mid prompt's gradient of the mix"),
    Metric("probe/cosine", "", "cosine of the mean gradients of GRPO and GAL"),
    Metric("probe/best_alpha", "", "α of the least variance"),
    Metric("probe/alpha", "", "α of the next updates (objective.alpha: auto)"),
    Metric("eval/<set>/accuracy", "fraction", "correct held-out responses among those with a verdict"),
    Metric("eval/<set>/accuracy_low", "fraction", "lower end of its 95% interval (Wilson's, prompts as clusters)"),
    Metric("eval/<set>/accuracy_high", "fraction", "upper end of that interval"),
    Metric("eval/<set>/num_samples", "responses", "held-out responses with a verdict"),
    Metric("eval/<set>/num_prompts", "prompts", "prompts of the set"),
    Metric("eval/<set>/pass@<k>", "fraction", "chance that one of k responses is correct (unbiased, Chen et al. 2021)"),
    Metric("eval/<set>/maj@<k>", "fraction", "chance that the majority of k responses is correct (docs/evaluation.md)"),
    Metric("eval/<set>/num_lost", "responses", "responses that never came: too long, refused or incomplete"),
    Metric("eval/<set>/num_without_verdict", "responses", "held-out responses that the verifier failed on"),
    Metric("eval/<set>/<source>/accuracy", "fraction", "accuracy on the prompts of one source, if a set has several"),
    Metric("eval/<set>/<source>/num_samples", "responses", "held-out responses of that source with a verdict"),
    Metric("eval/<set>/truncated_ratio", "fraction", "held-out responses that hit the response limit"),
    Metric("eval/<set>/response_len/mean", "tokens", "mean length of the held-out responses"),
)


def lookup(name: str, metrics: Iterable[Metric] = ()) -> Metric:
    """Return the row for ``name``, from the trainer's table or from ``metrics``, those of an objective.

    Raises ValueError, with the nearest name, if there is none.
    """
    table = (*METRICS, *metrics)
    for metric in table:
        if _pattern(metric.name).fullmatch(name):
            return metric
    near = difflib.get_close_matches(name, [metric.name for metric in table], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"metric {name!r} is neither in the table of megatron_dypo.metrics.names nor one of the objective{hint}"
    )


def name_part(text: str) -> str:
    """Return ``text`` as one part of a metric's name: without a slash. Different texts stay different."""
    return text.replace("%", "%25").replace("/", "%2F")


@functools.cache
def _pattern(name: str) -> re.Pattern[str]:
    parts = re.split(r"<\w+>", name)
    return re.compile("[^/]+".join(re.escape(part) for part in parts), re.DOTALL)
