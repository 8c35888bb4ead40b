"""Mutants written by hand: bugs that once passed every test. Each replaces a text that occurs once.

If a file changes and no longer has an old text, the run reports it; write that line again.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hand:
    """One bug."""

    path: str
    old: str
    new: str
    law: str
    """The law that the bug breaks."""


_O, _B, _R = "megatron_dypo/objective/", "megatron_dypo/batching/", "megatron_dypo/objective/recipes/"
_P = "megatron_dypo/"

HANDWRITTEN = (
    Hand(_R + "dypo.py", "scale=alpha, step", "scale=1 - alpha, step", "alpha weighs GRPO"),
    Hand(_R + "dypo.py", "totals, cfg, scale=1 - alpha)", "totals, cfg, scale=alpha)", "1 - alpha weighs GAL"),
    Hand(_R + "dypo.py", "scale=weight_at(cfg.gamma, step))", "scale=1.0)", "gamma scales SFT in dypo"),
    Hand(_R + "dypo.py", "bounds(self.cfg.alpha)[0] < 1 or bounds", "bounds", "GAL needs a reference"),
    Hand(_R + "dypo.py", "step < self.cfg.rl_only_steps", "step <= self.cfg.rl_only_steps", "the gate opens at its step"),
    Hand(_O + "token_weights.py", "statistics.loss / totals.num_prompts", "statistics.loss", "GAL's share of the loss is a mean"),
    Hand(_R + "grpo.py", "scale=1.0, step", "scale=0.5, step", "GRPO's own scale is one"),
    Hand(_R + "grpo.py", "return bounds(self.cfg.kl_coef)[1] > 0", "return False", "a KL term needs a reference"),
    Hand(_R + "sft.py", "scale = weight_at(self.cfg.gamma, step)", "scale = 1.0", "gamma scales SFT"),
    Hand(_R + "sft_then_rl.py", "group[0].treatment is Treatment.DISTILL", "step < self.cfg.sft_steps", "left-over traces stay traces"),
    Hand(_R + "sft_then_rl.py", "return self.grpo.needs_reference()", "return False", "the second phase needs its reference"),
    Hand(_O + "token_weights.py", "normalize_std=cfg.normalize_std, ", "", "normalize_std reaches the objective"),
    Hand(_O + "token_weights.py", ", epsilon=cfg.advantage_epsilon", "", "advantage_epsilon reaches the objective"),
    Hand(_O + "token_weights.py", "sequences = totals.num_sequences[sample.kind]", "sequences = totals.num_prompts", "three counts"),
    Hand(_O + "token_weights.py", "[sample.is_correct for sample in group]", "[sample.reward > 0 for sample in group]", "flags, not rewards"),
    Hand(_O + "token_weights.py", "totals.num_prompts * len(group) * length", "totals.num_prompts * length", "a group's mean"),
    Hand(_O + "token_weights.py", "kl_weight = share * weight", "kl_weight = scale / totals.num_prompts * weight", "KL has its length divisor"),
    Hand(_O + "token_weights.py", "if sample.current_logp_sum is not None:", "if False:", "exact coefficients"),
    Hand(_O + "route.py", "is_correct=verdict.is_correct", "is_correct=verdict.reward > 0", "flags, not rewards"),
    Hand(_O + "route.py", "return min(", "return max(", "a group is as old as its oldest member"),
    Hand(_O + "totals.py", "kind: len(of_kind) for kind", "kind: len(groups) for kind", "three counts"),
    Hand(_O + "totals.py", "prompts=len(groups)", "prompts=sum(map(len, groups))", "three counts"),
    Hand(_O + "gal.py", "weight_SF.square().mean()", "weight_SF.mean()", "eta is a second moment"),
    Hand(_O + "gal.py", "(beta * margin_SF).abs() > SATURATED_AT", "(beta * margin_SF) > SATURATED_AT", "saturated on both sides"),
    Hand(_O + "gal.py", "margin=float(margin_SF.mean())", "margin=float(margin_SF.abs().mean())", "the margin has a sign"),
    Hand(_O + "gal.py", "logsigmoid(beta * margin_SF)", "logsigmoid(margin_SF)", "beta enters the loss"),
    Hand(_O + "importance.py", "is_capped_N = is_rollout_N & (log_u", "is_capped_N = (log_u", "rollouts alone are capped"),
    Hand(_O + "importance.py", "is_rollout_N & ~_inside(log_u_N, cfg.token_bounds)", "~_inside(log_u_N, cfg.token_bounds)", "traces are never masked"),
    Hand(_O + "importance.py", "~(sequences.mean(log_u_N.abs()) <= cfg.sequence_max_gap)", "(sequences.mean(log_u_N.abs()) > cfg.sequence_max_gap)", "NaN is inside nothing"),
    Hand(_O + "ratios.py", "function(torch.where(is_far_N, LOG_RATIO_LIMIT, log_N))", "function(log_N)", "no overflow"),
    Hand(_O + "ratios.py", "torch.expm1, delta_N", "lambda t: t.exp() - 1, delta_N", "k3 near the reference"),
    Hand(_O + "loss.py", "torch.where(is_rollout_N, _shown(entropy_N, kept_N), 0.0)", "_shown(entropy_N, kept_N)", "entropy over rollouts"),
    Hand(_O + "loss.py", "is_rollout_N, -moved_N, 0.0", "is_rollout_N, moved_N, 0.0", "ppo_kl is old less new"),
    Hand(_O + "loss.py", "(drift_N * x[\"gal_scale\"]).abs()", "drift_N * x[\"gal_scale\"]", "drift is a distance"),
    Hand(_O + "loss.py", "torch.where(x[\"is_trace\"], -current_N, 0.0)", "-current_N", "the traces' own NLL"),
    Hand(_O + "loss.py", "torch.where(x[\"is_trace\"], nll_N, 0.0)", "nll_N", "SFT's loss without GAL's surrogate"),
    Hand(_O + "loss.py", "correction.is_kept & ~reads_N.isfinite()", "~reads_N.isfinite()", "a masked token does not poison"),
    Hand(_O + "loss.py", "~reads_N.isfinite(), math.nan", "~reads_N.isfinite(), 1.0", "what is not finite shows in gradients"),
    Hand("megatron_dypo/config/objective.py", "0 <= value[0] <= 1 <= value[1]", "0 <= value[0] <= value[1]", "bounds hold 1"),
    Hand("megatron_dypo/config/objective.py", "self.mode == \"refreshed\" and step", "step", "only refreshed refreshes"),
    Hand(_B + "exchange.py", "return sorted((s for part", "return list((s for part", "balance sorts"),
    Hand(_B + "exchange.py", "dealt_bins(np.array([cost for *_, cost in listing], np.float64), replicas)", "dealt_bins(np.ones(len(listing)), replicas)", "balance by cost"),
    Hand(_B + "exchange.py", "cost(s)) for s in samples]", "num_tokens(s)) for s in samples]", "balance by the given cost"),
    Hand(_B + "exchange.py", "return sorted(samples, key=_key)", "return list(samples)", "one replica sorts too"),
    Hand(_O + "streams.py", "attrgetter(\"ref_logp\")", "attrgetter(\"old_logp\")", "each stream is its own"),
    Hand(_O + "streams.py", "attrgetter(\"rollout_logp\")", "attrgetter(\"old_logp\")", "each stream is its own"),
    Hand(_B + "pack.py", "np.full(length, stream.fill, stream.dtype) if", "np.full(length, 0, stream.dtype) if", "padding has the stream's fill"),
    Hand(_P + "models/flops.py", "(passes + (recompute == \"full\"))", "passes", "recomputation costs"),
    Hand("megatron_dypo/loop/books/tally.py", "abs(float(error.sum(dtype=\"float64\")))", "float(abs(error).sum(dtype=\"float64\"))", "a sequence's error has both signs"),
    Hand(_O + "metrics.py", "of=\"entropy\", per=\"rollout_tokens\"", "of=\"entropy\", per=\"tokens\"", "entropy of rollouts"),
    Hand("megatron_dypo/loop/books/step_metrics.py", " + of_groups.get(n, 0.0)", "", "groups' sums are in the metrics"),
    Hand("megatron_dypo/loop/books/step_metrics.py", "traces / sum(totals.num_sequences.values())", "traces / totals.num_sequences[SampleKind.ROLLOUT]", "a share is of the whole"),
    Hand("megatron_dypo/loop/books/step_metrics.py", "traces / totals.num_prompts", "traces / sum(totals.num_sequences.values())", "the share of prompts"),
    Hand("megatron_dypo/loop/books/step_metrics.py", "tokens[SampleKind.TRACE] / max", "tokens[SampleKind.ROLLOUT] / max", "the offline share"),
    Hand(_P + "loop/books/tally.py", "if verdict.error is not None:", "if False:", "a verifier's error is no wrong answer"),
    Hand(_P + "loop/books/step_metrics.py", "tally.ratio(\"correct\", \"verdicts\")", "tally.ratio(\"correct\", \"rollouts\")", "accuracy is of the judged"),
    Hand(_P + "loop/books/step_metrics.py", "tally.ratio(\"reward\", \"verdicts\")", "tally.ratio(\"reward\", \"rollouts\")", "the mean reward is of the judged"),
    Hand(_P + "loop/books/step_metrics.py", "tally.ratio(f\"tier/{tier}\", \"graded\")", "tally.ratio(f\"tier/{tier}\", \"groups\")", "tiers are shares of the graded"),
    Hand(_P + "loop/books/tally.py", "\"wrong_versions\", \"dropped_rollouts\", \"dropped_tokens\"):", "\"wrong_versions\", \"dropped_rollouts\"):", "thrown away tokens are counted"),
    Hand(_P + "loop/books/tally.py", "tally.extreme(\"max:dropped_longest\", counts.dropped_longest)", "tally.add(\"max:dropped_longest\", counts.dropped_longest)", "the longest is no sum"),
    Hand(_P + "loop/books/tally.py", "if self[denominator] else None", "if self[denominator] else 0.0", "a mean over nothing is no number"),
    Hand(_P + "loop/books/step_metrics.py", "tally[\"dropped/incomplete\"]", "tally[\"dropped/refused\"]", "each reason has its own count"),
    Hand(_P + "loop/books/tally.py", "if key.startswith((\"max:\", \"min:\")):", "if key.startswith(\"max:\"):", "the smallest over replicas is no sum"),
    Hand(_P + "loop/books/tally.py", "elif group.rollouts:", "else:", "a prompt without rollouts has no verdict missing"),
    Hand(_P + "loop/books/ledger.py", "Treatment.REINFORCE: \"trained_rl\"", "Treatment.REINFORCE: \"trained_sft\"", "each kind of training has its account"),
    Hand(_P + "loop/books/ledger.py", " - self.open.waiting - self.open.in_flight", " - self.open.waiting", "what is in flight is on an account"),
    Hand(_P + "loop/books/ledger.py", "Counter({Treatment(name): int(count) for name, count in stored[\"trained\"].items()})", "Counter()", "the ledger goes on after a resume"),
    Hand(_P + "loop/books/outcomes.py", "(*_LOST, DropReason.NO_VERDICT, DropReason.TOO_LONG)", "(*_LOST, DropReason.NO_VERDICT)", "too long is known at once"),
    Hand(_P + "loop/books/outcomes.py", "self.last_reason = message or self.last_reason", "self.last_reason = message", "an Easy prompt has no reason to tell"),
    Hand(_P + "loop/books/outcomes.py", "verdicts=self.verdicts + other.verdicts", "verdicts=self.verdicts", "one replica's verdicts are enough"),
    Hand(_P + "loop/books/outcomes.py", "verdict.error is None and not (", "not (", "an error is no verdict"),
    Hand(_P + "loop/books/outcomes.py", "failed < at_least or now.verdicts > before.verdicts", "failed < at_least", "one verdict shows that the verifier works"),
    Hand(_P + "loop/books/outcomes.py", "now.verdicts > before.verdicts", "now.verdicts > 0", "verdicts of earlier rounds do not count"),
    Hand(_P + "loop/books/outcomes.py", "if outcomes.seen < num_prompts:", "if outcomes.graded + outcomes.seen < num_prompts:", "nothing is left only after all was seen"),
    Hand(_P + "loop/books/outcomes.py", "if outcomes.graded == 0:", "if outcomes.seen == 0:", "nothing graded is not nothing left"),
    Hand(_P + "loop/books/outcomes.py", "failed > usable.total()", "failed > 0", "a few lost groups do not hide that nothing is left"),
    Hand(_P + "loop/books/outcomes.py", "if dropped[DropReason.NO_VERDICT] > outcomes.lost else", "if dropped[DropReason.NO_VERDICT] >= outcomes.lost else", "the cause is what most came to"),
    Hand(_P + "loop/books/outcomes.py", "outcomes.lost == 0 and dropped[DropReason.NO_VERDICT] == 0", "outcomes.lost == 0", "a silent verifier is no bad input"),
    Hand(_O + "route.py", "        return False\n    treatment =", "        return True\n    treatment =", "what has no verdict is of no use"),
    Hand(_O + "route.py", " and bool(group.prompt.traces))", ")", "a Hard prompt without a trace is of no use"),
    Hand(_O + "route.py", "return treatment is Treatment.REINFORCE or (", "return (", "Mid is of use"),
    Hand(_P + "loop/books/admission.py", "(group.tier is not None or not group.rollouts) and group not in stale", "group not in stale", "a group without a verdict is not learned from"),
    Hand(_P + "loop/collect.py", "failure=self.failure or other.failure", "failure=self.failure", "what one leader met ends all"),
    Hand(_P + "loop/collect.py", "failed * 4 > outcomes.seen", "failed > outcomes.seen", "losses are said: a quarter is much"),
    Hand(_P + "loop/collect.py", "failed = outcomes.seen - outcomes.graded", "failed = outcomes.lost", "losses are all that could not be used"),
    Hand(_P + "loop/collect_from_stream.py", "if look.unserved:", "if False:", "a stream without servers gets a push"),
    Hand(_P + "loop/megatron_policy.py", "\"train/skipped\": float(not applied.ok)", "\"train/skipped\": float(applied.ok)", "a skipped update is said"),
    Hand(_P + "loop/train.py", "if update.end is None and (", "if (", "weights that are not finite are not pushed"),
    Hand(_P + "loop/megatron_policy.py", "(name for name in gather_world(own) if name is not None)", "(name for name in [own] if name is not None)", "one rank's bad weight is known to all"),
    Hand(_P + "loop/bad_steps/not_finite.py", "not np.isfinite(logp_R).all()", "np.isfinite(logp_R).all()", "the bad samples are named"),
    Hand(_P + "loop/bad_steps/not_finite.py", "weight is not None\n", "gradient is not None\n", "bad weights are told from bad gradients"),
    Hand(_P + "loop/servers.py", "sampled.groups.sort(key=lambda group: group.prompt.order)", "pass", "groups come in the order of their draws"),
    Hand(_P + "loop/evaluate.py", "lost=too_long + len(prompts) - len(groups)", "lost=len(prompts) - len(groups)", "held-out prompts that are too long are lost"),
    Hand(_P + "loop/evaluate.py", "[verdict for verdict in group.verdicts if verdict.error is None]", "list(group.verdicts)", "a response without a verdict is in no accuracy"),
    Hand(_P + "loop/evaluate.py", "f\"{prefix}/num_prompts\": len(score.prompts) + score.lost", "f\"{prefix}/num_prompts\": len(score.prompts)", "lost prompts are prompts"),
    Hand(_P + "loop/evaluate.py", "json.dumps([seed, prompt.prompt_id, prompt.visit])", "json.dumps([seed, prompt.prompt_id])", "each response has a seed of its own"),
    Hand(_P + "loop/resume.py", "        ledger.draw(len(behind))\n", "", "draws that a replica is behind with are in the ledger"),
    Hand(_P + "rollout/counts.py", "dropped_longest=max(self.dropped_longest, other.dropped_longest)", "dropped_longest=self.dropped_longest + other.dropped_longest", "the longest is no sum"),
    Hand(_P + "rollout/counts.py", "retries=self.retries - before.retries", "retries=self.retries", "counts are since the last look"),
    Hand(_P + "rollout/counts.py", "self.dropped_rollouts += len(lengths)", "self.dropped_rollouts += 1", "each response is one"),
)  # fmt: skip
