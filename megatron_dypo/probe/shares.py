"""Shares of the variance of one trajectory's contribution: by prompts, by length, by rollouts. They add up to 1.

The contribution x of a rollout of a Mid group is k times its weight times its score, so that a group's gradient is the
mean of its contributions. All parts are products of contributions of *different groups*, which are independent given
the prompt; two members of one group are not, since they share a baseline.

    prompts     ⟨x, x'⟩ of one prompt, minus that of two prompts
    length      ⟨x, x'⟩ of one prompt and the same quartile of its lengths, minus that of one prompt
    rollouts    |x|² minus ⟨x, x'⟩ of one prompt and quartile

The sum is |x|² minus ⟨x, x'⟩ of two prompts: the variance. Prompts with at least two Mid groups count, each as often as
it is Mid. A part may be estimated below zero. Suffixes: see ``scores.py``; B weights of the jackknife.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dypo.probe.gradients import Groups
from megatron_dypo.probe.resample import Tree, estimate, jackknife_weights, pair_sums, ratio
from megatron_dypo.probe.scores import Floats, Scores

QUARTILES = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """Means of products of the contributions of each prompt with at least two Mid groups."""

    mid_P: Floats
    square_P: Floats
    """|x|²."""
    same_quartile_P: Floats
    same_prompt_P: Floats
    mean_PP: Floats
    """Products of the prompts' mean contributions."""


def estimate_shares(scores: Scores, groups: Groups, *, seed: int = 0) -> Tree:
    """Return ``grpo`` and ``gal`` → share of ``prompts``, ``length`` and ``rollouts``."""
    weights = {"grpo": groups.grpo_PRk, "gal": groups.gal_PRk}
    return {name: _estimate_one(_make_parts(scores, groups, weight), seed) for name, weight in weights.items()}


def _estimate_one(parts: Parts, seed: int) -> Tree:
    count = len(parts.mid_P)
    share_BP = jackknife_weights(count, seed) * parts.mid_P
    total_B = share_BP.sum(axis=1)
    square_B, quartile_B, prompt_B = (
        ratio(share_BP @ values, total_B) for values in (parts.square_P, parts.same_quartile_P, parts.same_prompt_P)
    )
    apart_B = ratio(pair_sums(share_BP, parts.mean_PP), total_B**2 - (share_BP**2).sum(axis=1))
    variance_B = square_B - apart_B
    found = {"prompts": prompt_B - apart_B, "length": quartile_B - prompt_B, "rollouts": square_B - quartile_B}
    return {
        "prompts_with_two_mid": count,
        **{name: estimate(ratio(part_B, variance_B), informative=count) for name, part_B in found.items()},
    }


def _make_parts(scores: Scores, groups: Groups, weight_PRk: Floats) -> Parts:
    size = weight_PRk.shape[2]
    kept_P = np.flatnonzero(groups.is_mid_PR.sum(axis=1) >= 2)
    mean_Pd = np.zeros((len(kept_P), scores.score_Nd.shape[1]))
    figures = np.zeros((len(kept_P), 3))
    for row, prompt in enumerate(kept_P):
        mid_R = groups.is_mid_PR[prompt]
        score_Rkd = scores.score_Nd[groups.index_PRk[prompt, mid_R]].astype(np.float64)
        value_Rkd = size * weight_PRk[prompt, mid_R][..., None] * score_Rkd
        quartile_Rk = _quartiles(groups.length_PRk[prompt, mid_R])
        mean_Pd[row] = value_Rkd.mean(axis=(0, 1))
        figures[row] = (
            (value_Rkd**2).sum(axis=-1).mean(),
            _same_quartile(value_Rkd, quartile_Rk),
            _across_groups(value_Rkd, np.ones(quartile_Rk.shape, dtype=bool)) or 0.0,
        )
    return Parts(
        mid_P=groups.is_mid_PR[kept_P].sum(axis=1).astype(np.float64),
        square_P=figures[:, 0],
        same_quartile_P=figures[:, 1],
        same_prompt_P=figures[:, 2],
        mean_PP=mean_Pd @ mean_Pd.T,
    )


def _quartiles(length_Rk: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the quartile of each length among those of its prompt; equal lengths are in the same one."""
    ends = np.quantile(length_Rk, np.arange(1, QUARTILES) / QUARTILES)
    return np.asarray(np.searchsorted(ends, length_Rk), dtype=np.int64)


def _same_quartile(value_Rkd: Floats, quartile_Rk: NDArray[np.int64]) -> float:
    """Return the mean product of two contributions of different groups in the same quartile.

    A quartile counts by its rollouts; one whose rollouts are all of one group has no such product, and is left out.
    """
    total = count = 0.0
    for quartile in range(QUARTILES):
        in_it_Rk = quartile_Rk == quartile
        mean = _across_groups(value_Rkd, in_it_Rk)
        if mean is not None:
            total, count = total + mean * in_it_Rk.sum(), count + in_it_Rk.sum()
    return float(total / count) if count else _across_groups(value_Rkd, quartile_Rk >= 0) or 0.0


def _across_groups(value_Rkd: Floats, chosen_Rk: NDArray[np.bool_]) -> float | None:
    """Return the mean product of two chosen contributions of different groups; None if there are no two."""
    sum_Rd = (value_Rkd * chosen_Rk[..., None]).sum(axis=1)
    count_R = chosen_Rk.sum(axis=1).astype(np.float64)
    pairs = float(count_R.sum() ** 2 - (count_R**2).sum())
    if pairs == 0:
        return None
    whole_d = sum_Rd.sum(axis=0)
    return float(whole_d @ whole_d - (sum_Rd**2).sum()) / pairs
