"""Mutants written by hand: bugs that once passed every test. Each is a text that occurs once in its file, and another.

A file changes and an old text is gone: the run then says so, and the line is to be written anew.
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
    """What it breaks."""


_O, _B, _R = "megatron_dypo/objective/", "megatron_dypo/batching/", "megatron_dypo/objective/recipes/"

HANDWRITTEN = (
    Hand(_R + "dypo.py", "scale=cfg.alpha)", "scale=1 - cfg.alpha)", "alpha weighs GRPO"),
    Hand(_R + "dypo.py", "totals, cfg, scale=1 - cfg.alpha)", "totals, cfg, scale=cfg.alpha)", "1 - alpha weighs GAL"),
    Hand(_R + "dypo.py", "scale=cfg.gamma)", "scale=1.0)", "gamma scales SFT in dypo"),
    Hand(_R + "dypo.py", "self.cfg.alpha < 1 or self.cfg.kl_coef > 0", "self.cfg.kl_coef > 0", "GAL needs a reference"),
    Hand(_R + "dypo.py", "step < self.cfg.switch_gate", "step <= self.cfg.switch_gate", "the gate opens at its step"),
    Hand(_R + "dypo.py", "/ totals.num_prompts if statistics", "if statistics", "GAL's share of the loss is a mean"),
    Hand(_R + "grpo.py", "scale=1.0)", "scale=self.cfg.alpha)", "GRPO's own scale is one"),
    Hand(_R + "grpo.py", "return self.cfg.kl_coef > 0", "return False", "a KL term needs a reference"),
    Hand(_R + "sft.py", "scale=self.cfg.gamma)", "scale=1.0)", "gamma scales SFT"),
    Hand(_R + "sft_then_rl.py", "group[0].treatment is Treatment.DISTIL", "step < self.cfg.sft_steps", "left-over traces stay traces"),
    Hand(_R + "sft_then_rl.py", "return self.grpo.needs_reference()", "return False", "the second phase needs its reference"),
    Hand(_O + "weigh.py", "normalize_std=cfg.normalize_std, ", "", "normalize_std reaches the objective"),
    Hand(_O + "weigh.py", ", epsilon=cfg.advantage_epsilon", "", "advantage_epsilon reaches the objective"),
    Hand(_O + "weigh.py", "sequences = totals.num_sequences[sample.treatment]", "sequences = totals.num_prompts", "three counts"),
    Hand(_O + "weigh.py", "[sample.is_correct for sample in group]", "[sample.reward > 0 for sample in group]", "flags, not rewards"),
    Hand(_O + "weigh.py", "totals.num_prompts * len(group) * length", "totals.num_prompts * length", "a group's mean"),
    Hand(_O + "weigh.py", "kl=share * cfg.kl_coef", "kl=cfg.kl_coef * scale / totals.num_prompts", "KL has its length divisor"),
    Hand(_O + "weigh.py", "if sample.current_logp_sum is not None:", "if False:", "exact coefficients"),
    Hand(_O + "route.py", "is_correct=verdict.is_correct", "is_correct=verdict.reward > 0", "flags, not rewards"),
    Hand(_O + "route.py", "oldest = min(", "oldest = max(", "a group is as old as its oldest member"),
    Hand(_O + "totals.py", "sequences=len(samples)", "sequences=len(of_kind)", "three counts"),
    Hand(_O + "totals.py", "prompts=len(of_kind)", "prompts=len(samples)", "three counts"),
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
    Hand(_O + "loss.py", "kept_N), 0.0), is_clipped_N & kept_N & (x.surrogate != 0), -moved_N,", "kept_N), 0.0), is_clipped_N & kept_N & (x.surrogate != 0), moved_N,", "ppo_kl is old less new"),
    Hand(_O + "loss.py", "(drift_N * x.anchor).abs()", "drift_N * x.anchor", "drift is a distance"),
    Hand(_O + "loss.py", "torch.where(x.is_trace, -current_N, 0.0)", "-current_N", "the traces' own NLL"),
    Hand(_O + "loss.py", "torch.where(x.is_trace, loss_nll_N, 0.0)", "loss_nll_N", "SFT's loss without GAL's surrogate"),
    Hand(_O + "loss.py", "correction.is_kept & ~reads_N.isfinite()", "~reads_N.isfinite()", "a masked token does not poison"),
    Hand(_O + "loss.py", "~reads_N.isfinite(), math.nan", "~reads_N.isfinite(), 1.0", "what is not finite shows in gradients"),
    Hand("megatron_dypo/config/objective.py", "0 <= value[0] <= 1 <= value[1]", "0 <= value[0] <= value[1]", "bounds hold 1"),
    Hand("megatron_dypo/config/objective.py", "self.mode == \"refreshed\" and step", "step", "only refreshed refreshes"),
    Hand(_B + "exchange.py", "return sorted((s for part", "return list((s for part", "balance sorts"),
    Hand(_B + "exchange.py", "bins_balanced([cost for *_, cost in listing], replicas)", "bins_balanced([1.0 for _ in listing], replicas)", "balance by cost"),
    Hand(_B + "exchange.py", "cost(s)) for s in samples]", "num_tokens(s)) for s in samples]", "balance by the given cost"),
    Hand(_B + "exchange.py", "return sorted(samples, key=_key)", "return list(samples)", "one replica sorts too"),
    Hand(_B + "queues.py", "return not any(left_by_replica)", "return not all(left_by_replica)", "the last mini-batch over uneven replicas"),
    Hand(_B + "queues.py", "if g[0].order not in wanted]", "if False]", "other groups go on waiting"),
    Hand(_B + "queues.py", "<= max_staleness]", "< max_staleness]", "at the limit is not beyond it"),
    Hand(_B + "queues.py", "(-g[0].updates_left, g[0].order)", "(g[0].updates_left, g[0].order)", "pass after pass"),
    Hand(_B + "queues.py", "s.scored_version != version]", "s.scored_version is None]", "log-probs of older weights are made anew"),
    Hand(_B + "pack.py", "\"ref_logp_T\": sample.ref_logp", "\"ref_logp_T\": sample.old_logp", "each stream is its own"),
    Hand(_B + "pack.py", "\"rollout_logp_T\": sample.rollout_logp", "\"rollout_logp_T\": sample.old_logp", "each stream is its own"),
    Hand(_B + "pack.py", "\"anchor_T\": weights.anchor", "\"anchor_T\": weights.nll", "each weight is its own"),
    Hand(_B + "flops.py", "(passes + (recompute == \"full\"))", "passes", "recomputation costs"),
    Hand("megatron_dypo/tally.py", "abs(float(error.sum(dtype=\"float64\")))", "float(abs(error).sum(dtype=\"float64\"))", "a sequence's error has both signs"),
    Hand("megatron_dypo/tally.py", "total[\"entropy\"] / tokens", "total[\"entropy\"] / total[\"tokens\"]", "entropy of rollouts"),
    Hand("megatron_dypo/tally.py", "+ tally[\"gal_loss_share\"]", "", "train/loss has GAL"),
    Hand("megatron_dypo/tally.py", "distil / (distil + reinforce)", "distil / reinforce", "a share is of the whole"),
    Hand("megatron_dypo/tally.py", "distil / totals.num_prompts", "distil / (distil + reinforce)", "the share of prompts"),
    Hand("megatron_dypo/tally.py", "tokens[Treatment.DISTIL] / all_tokens", "tokens[Treatment.REINFORCE] / all_tokens", "the offline share"),
    Hand("megatron_dypo/stages.py", "not any(left for _, left in counts)", "not all(left for _, left in counts)", "the last mini-batch over uneven replicas"),
    Hand("megatron_dypo/scoring.py", "run.reference.swapped_in():", "contextlib.nullcontext():", "pi_ref is scored under its weights"),
    Hand("megatron_dypo/train.py", "run.reference.capture()", "pass", "refreshed refreshes"),
)  # fmt: skip
"""The last six wait for the loop's new files."""
