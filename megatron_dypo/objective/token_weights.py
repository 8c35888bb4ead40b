"""From log-probs of a group to the token weights of the loss (dypo.md, sections 3 to 5). Pure.

An objective composes these: each function gives one term's share for each member of one group, with the global
normaliser 1/n, the group's 1/k and the length divisor folded in. Legend: G members of a group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.objective.advantage import group_advantages
from megatron_dypo.objective.gal import gal_coefficients, gal_statistics, gal_sums
from megatron_dypo.objective.loss import VALUE
from megatron_dypo.types import Sample, TokenWeights, Totals


def length_divisor(sample: Sample, totals: Totals, cfg: ObjectiveConfig) -> float:
    """Return the divisor of the token sum of ``sample``, the same in GRPO, SFT and ℓ_i (section 4, "one knob")."""
    match cfg.length_normalization:
        case "sum":
            return 1.0
        case "sequence_mean":
            return float(max(sample.num_response_tokens, 1))
        case "token_mean":
            sequences = totals.num_sequences[sample.kind]
            return max(totals.num_response_tokens[sample.kind] / sequences, 1.0)
        case "constant":
            return float(cfg.constant_length)


def sft_weights(trace: Sample, totals: Totals, cfg: ObjectiveConfig, *, scale: float) -> TokenWeights:
    """Return the weights of ``scale``·L_SFT of one prompt (eq. 5, 20), its share of the mean over prompts included."""
    return {"nll_weight": scale / (totals.num_prompts * length_divisor(trace, totals, cfg))}


def grpo_weights(group: Sequence[Sample], totals: Totals, cfg: ObjectiveConfig, *, scale: float) -> list[TokenWeights]:
    """Return the weights of ``scale``·L_GRPO of one prompt (eq. 3, 21, 22), the KL term included."""
    reward_G = torch.tensor([sample.reward for sample in group], dtype=torch.float64)
    advantage_G = group_advantages(reward_G, normalize_std=cfg.normalize_std, epsilon=cfg.advantage_epsilon)
    weights: list[TokenWeights] = []
    for sample, advantage in zip(group, advantage_G.tolist(), strict=True):
        share = scale / (totals.num_prompts * len(group) * length_divisor(sample, totals, cfg))
        weights.append({"advantage": advantage, "pg_weight": share, "kl_weight": share * cfg.kl_coef})
    return weights


def gal_weights(
    group: Sequence[Sample], totals: Totals, cfg: ObjectiveConfig, *, scale: float
) -> tuple[list[TokenWeights], dict[str, float]]:
    """Return the weights of ``scale``·L_GAL of one prompt (eq. 14, 15), −``scale``·c_i/(n·divisor) on −log π, and sums.

    The sums are those of ``GAL_METRICS``, and the group's share of the objective's value, which the loss does not hold:
    its nll term has GAL's gradient and not its value. Without a pair there are none.
    """
    log_ratio_G = group_log_ratios(group, totals, cfg)
    is_success_G = torch.tensor([sample.is_correct for sample in group])
    coef_G = gal_coefficients(log_ratio_G, is_success_G, cfg.beta_gal)
    statistics = gal_statistics(log_ratio_G, is_success_G, cfg.beta_gal)
    if statistics is None:
        return [{} for _ in group], {}
    weights: list[TokenWeights] = []
    for sample, coef in zip(group, coef_G.tolist(), strict=True):
        unit = 1 / length_divisor(sample, totals, cfg)
        weights.append({"nll_weight": -scale * coef * unit / totals.num_prompts, "gal_scale": unit})
    value = scale * statistics.loss / totals.num_prompts
    return weights, {VALUE: value, **gal_sums(statistics, log_ratio_G)}


def group_log_ratios(group: Sequence[Sample], totals: Totals, cfg: ObjectiveConfig) -> Tensor:
    """Return [G] float64 ℓ_i / divisor, under the update's own weights where those were computed, else under π_old."""
    return torch.tensor([_log_ratio(s) / length_divisor(s, totals, cfg) for s in group], dtype=torch.float64)


def _log_ratio(sample: Sample) -> float:
    assert sample.old_logp is not None, "log-probs come before token weights"
    assert sample.ref_logp is not None, "log-probs come before token weights"
    ref_sum = float(sample.ref_logp.sum(dtype="float64"))
    if sample.current_logp_sum is not None:
        return sample.current_logp_sum - ref_sum
    return float(sample.old_logp.sum(dtype="float64")) - ref_sum


def add_weights(first: TokenWeights, second: TokenWeights) -> TokenWeights:
    """Return the weights of both terms on one trajectory; at most one of them has an advantage or GAL's scale."""
    both = {**first, **second}
    for name in first.keys() & second.keys():
        assert name not in ("advantage", "gal_scale"), f"{name} of two terms"
        both[name] = first[name] + second[name]
    return both
