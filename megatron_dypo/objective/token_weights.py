"""From the log-probs of a group to the token weights of the loss. Pure.

An objective combines these functions. Each returns one term's weights for each member of one group. The weights include
the global 1/n, the group's 1/k and the length divisor. Legend: G members of a group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.config.schedule import weight_at
from megatron_dypo.objective.advantage import group_advantages
from megatron_dypo.objective.gal import gal_coefficients, gal_statistics, gal_sums
from megatron_dypo.objective.loss import VALUE
from megatron_dypo.types import Sample, SampleKind, TokenWeights, Totals


def length_divisor(sample: Sample, totals: Totals, cfg: ObjectiveConfig, group: Sequence[Sample] = ()) -> float:
    """Return the divisor of the token sum of ``sample``, the same in GRPO, SFT and ℓ_i.

    Args:
        group: all members of the sample's group, which ``group_mean`` reads. (): the sample is alone.
    """
    match cfg.length_normalization:
        case "sum":
            return 1.0
        case "sequence_mean":
            return float(max(sample.num_response_tokens, 1))
        case "token_mean":
            sequences = totals.num_sequences[sample.kind]
            return max(totals.num_response_tokens[sample.kind] / sequences, 1.0)
        case "group_mean":
            lengths = [member.num_response_tokens for member in group or (sample,)]
            return max(sum(lengths) / len(lengths), 1.0)
        case "constant":
            return float(cfg.constant_length)


def trace_share(trace: Sample, totals: Totals, cfg: ObjectiveConfig, group: Sequence[Sample] = ()) -> float:
    """Return the weight of one token of a trace, as ``trace_normalization`` says."""
    match cfg.trace_normalization:
        case "same":
            return 1 / (totals.num_prompts * length_divisor(trace, totals, cfg, group))
        case "sequence_mean":
            return 1 / (totals.num_prompts * max(trace.num_response_tokens, 1))
        case "token_mean":
            return 1 / max(totals.num_response_tokens[SampleKind.TRACE], 1)


def sft_weights(
    trace: Sample, totals: Totals, cfg: ObjectiveConfig, *, scale: float, group: Sequence[Sample] = ()
) -> TokenWeights:
    """Return the weights of ``scale``·L_SFT of one prompt (eq. 5, 20), its share of the mean over prompts included.

    Args:
        group: all members of the trace's group, if there are others.
    """
    return {"nll_weight": scale * trace_share(trace, totals, cfg, group)}


def advantages(group: Sequence[Sample], cfg: ObjectiveConfig) -> list[float]:
    """Return Â of each given member (eq. 21); all given members form the group."""
    reward_G = torch.tensor([sample.reward for sample in group], dtype=torch.float64)
    return group_advantages(reward_G, normalize_std=cfg.normalize_std, epsilon=cfg.advantage_epsilon).tolist()


def grpo_weights(
    group: Sequence[Sample],
    totals: Totals,
    cfg: ObjectiveConfig,
    *,
    scale: float,
    step: int,
) -> list[TokenWeights]:
    """Return the weights of ``scale``·L_GRPO of one prompt (eq. 3, 21, 22), the KL term included.

    Args:
        step: the optimizer step, on which the weight of the KL term may depend.
    """
    weights: list[TokenWeights] = []
    for sample, advantage in zip(group, advantages(group, cfg), strict=True):
        share = scale / (totals.num_prompts * len(group) * length_divisor(sample, totals, cfg, group))
        kl_weight = share * weight_at(cfg.kl_coef, step)
        weights.append({"advantage": advantage, "pg_weight": share, "kl_weight": kl_weight})
    return weights


def entropy_weight(totals: Totals, cfg: ObjectiveConfig, step: int) -> float:
    """Return the weight of one token's entropy: ``entropy_coef`` / number of response tokens of the update."""
    return weight_at(cfg.entropy_coef, step) / max(sum(totals.num_response_tokens.values()), 1)


def split_group(group: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Return the rollouts and the traces of a group."""
    rollouts = [sample for sample in group if sample.kind is SampleKind.ROLLOUT]
    return rollouts, [sample for sample in group if sample.kind is SampleKind.TRACE]


def gal_weights(
    group: Sequence[Sample], totals: Totals, cfg: ObjectiveConfig, *, scale: float
) -> tuple[list[TokenWeights], dict[str, float]]:
    """Return the weights of ``scale``·L_GAL of one prompt (eq. 14, 15), −``scale``·c_i/(n·divisor) on −log π, and sums.

    The sums are those of ``GAL_METRICS`` and the group's share of the objective's value: the nll term of the loss has
    GAL's gradient, but not its value. A group without a pair has no sums.
    """
    log_ratio_G = group_log_ratios(group, totals, cfg)
    is_success_G = torch.tensor([sample.is_correct for sample in group])
    coef_G = gal_coefficients(log_ratio_G, is_success_G, cfg.beta_gal)
    statistics = gal_statistics(log_ratio_G, is_success_G, cfg.beta_gal)
    if statistics is None:
        return [{} for _ in group], {}
    weights: list[TokenWeights] = []
    for sample, coef in zip(group, coef_G.tolist(), strict=True):
        unit = 1 / length_divisor(sample, totals, cfg, group)
        weights.append({"nll_weight": -scale * coef * unit / totals.num_prompts, "gal_scale": unit})
    value = scale * statistics.loss / totals.num_prompts
    return weights, {VALUE: value, **gal_sums(statistics, log_ratio_G)}


def group_log_ratios(group: Sequence[Sample], totals: Totals, cfg: ObjectiveConfig) -> Tensor:
    """Return [G] float64 ℓ_i / divisor, under the update's own weights if those were computed, else under π_old."""
    return torch.tensor([_log_ratio(s) / length_divisor(s, totals, cfg, group) for s in group], dtype=torch.float64)


def _log_ratio(sample: Sample) -> float:
    assert sample.old_logp is not None, "log-probs come before token weights"
    assert sample.ref_logp is not None, "log-probs come before token weights"
    ref_sum = float(sample.ref_logp.sum(dtype="float64"))
    if sample.current_logp_sum is not None:
        return sample.current_logp_sum - ref_sum
    return float(sample.old_logp.sum(dtype="float64")) - ref_sum


def add_weights(first: TokenWeights, second: TokenWeights) -> TokenWeights:
    """Add the weights of two terms on one trajectory; at most one of them has an advantage or GAL's scale."""
    both = {**first, **second}
    for name in first.keys() & second.keys():
        assert name not in ("advantage", "gal_scale"), f"{name} of two terms"
        both[name] = first[name] + second[name]
    return both
