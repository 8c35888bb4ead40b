"""Variances, covariance and means of one prompt's gradient under GRPO, GAL and their mix, from products of vectors.

The variance of a random vector g is the trace of its covariance, E|g|² − |E g|². A sum over n prompts has it divided by
n. The squared norm of a mean is estimated from products of *different* prompts, which have no bias: the norm of an
estimated mean is far too large where noise dominates.

There are two scopes. ``all``: g is 1_Mid·∇L, zero for a group that is not Mid; the mean is over all prompts. ``mid``:
the distribution of groups given that they are Mid, as in an update's batch; a prompt counts as often as it is Mid.
Suffixes: see ``scores.py``; B weights of the jackknife.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_dypo.probe.gradients import Groups, prompt_gradients
from megatron_dypo.probe.resample import pair_counts, pair_sums, ratio
from megatron_dypo.probe.scores import Floats, Integers, Scores

Scope = Literal["all", "mid"]
PAIRS = ("grpo", "gal", "both")
"""Products of GRPO's gradients, of GAL's, and of one with the other."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Products:
    """Inner products of the gradients of prompts that have at least one group; each dict has the keys of PAIRS."""

    groups_P: Integers
    """R_q."""
    mid_P: Integers
    """Groups of the prompt that are Mid."""
    mean_PP: dict[str, Floats]
    """[P, P] Products of the prompts' means over their groups; of ``both``, GRPO's mean of the row's prompt."""
    square_P: dict[str, Floats]
    """[P] Mean over the prompt's groups of the product of a group's two gradients."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Moments of one prompt's gradient under each row of weights; each dict has the keys of PAIRS."""

    total_B: dict[str, Floats]
    """Variance (of ``both``: covariance). The sum of the next two."""
    within_B: dict[str, Floats]
    """The part between groups of the same prompt; NaN if no prompt has two."""
    between_B: dict[str, Floats]
    """The part between prompts' expected gradients."""
    mean_B: dict[str, Floats]
    """Squared norm of the mean gradient (of ``both``: product of the two means)."""
    informative: int
    """Prompts that have a Mid group."""


def make_products(scores: Scores, groups: Groups) -> Products:
    """Compute the products, with the gradients of one prompt in memory at a time."""
    count_P = groups.is_group_PR.sum(axis=1)
    size = (groups.num_prompts, scores.score_Nd.shape[1])
    grpo_Pd, gal_Pd = np.zeros(size), np.zeros(size)
    square_P = {pair: np.zeros(len(count_P)) for pair in PAIRS}
    for prompt, one in enumerate(prompt_gradients(scores, groups)):
        count = max(int(count_P[prompt]), 1)
        grpo_Pd[prompt], gal_Pd[prompt] = one.grpo_Rd.sum(axis=0) / count, one.gal_Rd.sum(axis=0) / count
        square_P["grpo"][prompt] = np.vdot(one.grpo_Rd, one.grpo_Rd) / count
        square_P["gal"][prompt] = np.vdot(one.gal_Rd, one.gal_Rd) / count
        square_P["both"][prompt] = np.vdot(one.grpo_Rd, one.gal_Rd) / count
    has_P = count_P > 0
    grpo_Pd, gal_Pd = grpo_Pd[has_P], gal_Pd[has_P]
    return Products(
        groups_P=count_P[has_P],
        mid_P=groups.is_mid_PR.sum(axis=1)[has_P],
        mean_PP={"grpo": grpo_Pd @ grpo_Pd.T, "gal": gal_Pd @ gal_Pd.T, "both": grpo_Pd @ gal_Pd.T},
        square_P={pair: square[has_P] for pair, square in square_P.items()},
    )


def compute_moments(products: Products, weight_BP: Floats, scope: Scope) -> Moments:
    """Compute the moments in one scope.

    In the scope ``all``, everything is unbiased. In the scope ``mid``, the squared mean is a quotient of two unbiased
    estimates, and the part within prompts is a mean over prompts with at least two Mid groups, weighted by these.
    """
    share_P = products.mid_P / products.groups_P if scope == "mid" else np.ones(len(products.groups_P))
    count_P = products.mid_P if scope == "mid" else products.groups_P
    chance_BP = weight_BP * share_P
    paired_BP = chance_BP * (count_P >= 2)
    total_B, within_B, between_B, mean_B = {}, {}, {}, {}
    for pair in PAIRS:
        square_P, mean_PP = products.square_P[pair], products.mean_PP[pair]
        mean_B[pair] = ratio(pair_sums(weight_BP, mean_PP), pair_counts(chance_BP))
        total_B[pair] = ratio(weight_BP @ square_P, chance_BP.sum(axis=1)) - mean_B[pair]
        # Σ over the counted groups of (a − mean)·(b − mean), where groups that are not counted have zero vectors
        deviation_P = products.groups_P * square_P - products.groups_P**2 * np.diag(mean_PP) / np.maximum(count_P, 1)
        own_P = deviation_P / np.maximum(count_P - 1, 1)
        within_B[pair] = ratio(paired_BP @ own_P, paired_BP.sum(axis=1))
        between_B[pair] = total_B[pair] - within_B[pair]
    return Moments(
        total_B=total_B,
        within_B=within_B,
        between_B=between_B,
        mean_B=mean_B,
        informative=int((products.mid_P > 0).sum()),
    )


def of_mix(parts_B: dict[str, Floats], alpha: float | Floats) -> Floats:
    """Return the moment of α·GRPO + (1 − α)·GAL from those of its terms."""
    rest = 1 - alpha
    return np.asarray(
        alpha**2 * parts_B["grpo"] + rest**2 * parts_B["gal"] + 2 * alpha * rest * parts_B["both"], dtype=np.float64
    )


def best_alpha(variance_B: dict[str, Floats], *, with_covariance: bool = True) -> Floats:
    """Return the α of the smallest variance of the mix, (V_GAL − C) / (V_GRPO + V_GAL − 2C), not cut to [0, 1].

    Args:
        with_covariance: False: C = 0, as the paper has it.
    """
    covariance_B = variance_B["both"] if with_covariance else np.zeros_like(variance_B["both"])
    difference_B = variance_B["grpo"] + variance_B["gal"] - 2 * covariance_B
    return ratio(variance_B["gal"] - covariance_B, difference_B)


def signal_slope(moments: Moments, alpha: float) -> Floats:
    """Return [B] a number with the sign of the derivative by α of the mix's |mean|² / variance, at ``alpha``."""
    mean_B, variance_B = (of_mix(parts, alpha) for parts in (moments.mean_B, moments.total_B))
    return _slope(moments.mean_B, alpha) * variance_B - mean_B * _slope(moments.total_B, alpha)


def _slope(parts_B: dict[str, Floats], alpha: float) -> Floats:
    """Return the derivative of :func:`of_mix` by α."""
    return 2 * (alpha * parts_B["grpo"] - (1 - alpha) * parts_B["gal"] + (1 - 2 * alpha) * parts_B["both"])
