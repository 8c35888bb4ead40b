"""The gate as a scalar: E[gate·gradient] of eq. 4 against P(gate)·E[gradient], that is the covariance of the two.

For a prompt q, h_q is the share of its groups that pass the gate, an unbiased estimate of the chance.

*Hard and SFT*: g_q is the mean of ∇L_SFT over the teachers that have a trace. It does not depend on the rollouts, so
nothing is lost: the estimate is over all prompts with a trace and a group.

*Mid and GRPO or GAL*: g_q is the mean gradient over the prompt's Mid groups, an unbiased estimate of E[g | q, Mid]. A
prompt that was never Mid in R groups has no such gradient, so the estimate is over prompts with at least one Mid group.
How the gate and the gradient go together within a prompt has no meaning: GRPO and GAL are 0 without both outcomes.

With D = Cov(h, g), squared norms and products are sums over two to four *different* prompts, so they are unbiased.
Suffixes: see ``scores.py``; B weights of the jackknife.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_dypo.probe.gradients import Groups, Setting, sft_gradients
from megatron_dypo.probe.moments import Products
from megatron_dypo.probe.resample import Tree, estimate, jackknife_weights, pair_sums, ratio
from megatron_dypo.probe.scores import Floats, Scores


@dataclass(frozen=True, kw_only=True, eq=False)
class GatedProducts:
    """A gate and the products of gradients of P prompts."""

    chance_P: Floats
    """h_q."""
    product_PP: Floats
    """⟨g_q, g_q'⟩."""


def hard_gate(scores: Scores, setting: Setting, groups: Groups) -> GatedProducts:
    """Compute the gate of Hard and the gradients of SFT, of prompts that have a group and a trace."""
    gradient_PMd, has_PM = sft_gradients(scores, setting)
    kept_P = has_PM.any(axis=1) & groups.is_group_PR.any(axis=1)
    gradient_Pd = gradient_PMd[kept_P].sum(axis=1) / has_PM[kept_P].sum(axis=1, keepdims=True)
    hard_P, count_P = groups.is_hard_PR[kept_P].sum(axis=1), groups.is_group_PR[kept_P].sum(axis=1)
    return GatedProducts(chance_P=hard_P / count_P, product_PP=gradient_Pd @ gradient_Pd.T)


def mid_gate(products: Products, term: str) -> GatedProducts:
    """Compute the gate of Mid and the gradients of ``grpo`` or ``gal``, of prompts with a Mid group."""
    kept_P = products.mid_P > 0
    chance_P = products.mid_P[kept_P] / products.groups_P[kept_P]
    product_PP = products.mean_PP[term][np.ix_(kept_P, kept_P)] / np.outer(chance_P, chance_P)
    return GatedProducts(chance_P=chance_P, product_PP=product_PP)


def estimate_gate(gated: GatedProducts, *, seed: int = 0) -> Tree:
    """Return how far the gate is from a scalar.

    Returns:
        ``chance``: E[h]. ``squared_error``: |D|²/|E[h·g]|², whose root is ``relative_error``. ``cosine``: of E[h·g] and
        E[g]. ``squared_covariance``: |D|². ``squared_gated``: |E[h·g]|².
    """
    chance_P, product_PP = gated.chance_P, gated.product_PP
    weight_BP = jackknife_weights(len(chance_P), seed)
    gated_B, cross_B, plain_B, near_B = _products(weight_BP, chance_P, product_PP)
    covariance_B = gated_B - 2 * cross_B + plain_B
    count_B = weight_BP.sum(axis=1)
    pairs_B = count_B * (count_B - 1)
    mean_B = ratio(pair_sums(weight_BP, product_PP), pairs_B)
    length_B = np.sqrt(np.maximum(gated_B, 0) * np.maximum(mean_B, 0))
    known = int((chance_P > 0).sum())
    squared = estimate(ratio(covariance_B, gated_B), informative=known, least=0.0)
    return {
        "prompts": len(chance_P),
        "prompts_that_pass": known,
        "chance": estimate(ratio(weight_BP @ chance_P, count_B), informative=len(chance_P), least=0.0, largest=1.0),
        "relative_error": squared.root(),
        "squared_error": squared,
        "cosine": estimate(ratio(near_B, length_B), informative=known, scale="fisher", least=-1.0, largest=1.0),
        "squared_covariance": estimate(covariance_B, informative=known),
        "squared_gated": estimate(gated_B, informative=known),
    }


def _products(weight_BP: Floats, chance_P: Floats, product_PP: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Return [B] unbiased |E[hg]|², ⟨E[hg], E[h]·E[g]⟩, |E[h]·E[g]|² and ⟨E[hg], E[g]⟩.

    The weights are 0 or 1. With u = w·h and H = Σu, the sum over the indices of h that differ from those of g is what
    is left of H, or of H² − Σu² for two of them, without the terms of the same prompts.
    """
    pass_BP = weight_BP * chance_P
    whole_B, squares_B = pass_BP.sum(axis=1), (pass_BP**2).sum(axis=1)
    n_B = weight_BP.sum(axis=1)
    ww_B, uw_B, uu_B = (
        pair_sums(weight_BP, product_PP),
        pair_sums(pass_BP, product_PP, weight_BP),
        pair_sums(pass_BP, product_PP),
    )
    # Σ_{i≠k} u_i·G_ik·(H − u_i − u_k)
    cross_B = whole_B * uw_B - pair_sums(pass_BP * chance_P, product_PP, weight_BP) - uu_B
    # Σ_{k≠l} G_kl·((H − u_k − u_l)² − (Σu² − u_k² − u_l²))
    plain_B = (
        (whole_B**2 - squares_B) * ww_B
        - 4 * whole_B * uw_B
        + 4 * pair_sums(pass_BP * chance_P, product_PP, weight_BP)
        + 2 * uu_B
    )
    two_B = n_B * (n_B - 1)
    three_B = two_B * (n_B - 2)
    return (
        ratio(uu_B, two_B),
        ratio(cross_B, three_B),
        ratio(plain_B, three_B * (n_B - 3)),
        ratio(uw_B, two_B),
    )
