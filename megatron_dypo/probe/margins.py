"""GAL's own diagnostics against each reference, with intervals: η, saturation, the mean margin.

η = E[σ(−β·d)²] bounds GAL's variance in eq. 17. It is ¼ where every d is 0, as against π_old, and smaller only where
successes have larger log-ratios than failures.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from megatron_dypo.objective.gal import gal_statistics
from megatron_dypo.probe.gradients import Groups, Setting, make_groups
from megatron_dypo.probe.resample import Tree, estimate, jackknife_weights, ratio
from megatron_dypo.probe.scores import Floats, Scores

FIGURES = ("eta", "saturation", "margin")


def estimate_margins(scores: Scores, setting: Setting, *, seed: int = 0) -> Tree:
    """Return reference → ``eta``, ``saturation`` (share of pairs with |β·d| above 5) and ``margin`` (mean d).

    Each is a mean over Mid groups of the mean over a group's pairs, as in the metrics ``gal/…`` of a run.
    """
    return {
        reference: _estimate_one(scores, replace(setting, reference=reference), seed)
        for reference in scores.log_ratio_N
    }


def _estimate_one(scores: Scores, setting: Setting, seed: int) -> Tree:
    groups = make_groups(scores, setting)
    sum_PF = _sums(scores, groups, setting.beta_gal)
    mid_P = groups.is_mid_PR.sum(axis=1)
    weight_BP = jackknife_weights(groups.num_prompts, seed)
    found_BF = np.stack([ratio(weight_BP @ sum_P, weight_BP @ mid_P) for sum_P in sum_PF.T], axis=1)
    informative = int((mid_P > 0).sum())
    return {name: estimate(found_BF[:, index], informative=informative) for index, name in enumerate(FIGURES)}


def _sums(scores: Scores, groups: Groups, beta: float) -> Floats:
    """Return [P, 3] sums of the figures over each prompt's Mid groups."""
    sum_PF = np.zeros((groups.num_prompts, len(FIGURES)))
    for prompt, group in np.argwhere(groups.is_mid_PR):
        log_ratio_k = torch.from_numpy(groups.log_ratio_PRk[prompt, group])
        is_correct_k = torch.from_numpy(scores.is_correct_N[groups.index_PRk[prompt, group]])
        statistics = gal_statistics(log_ratio_k, is_correct_k, beta)
        assert statistics is not None, "a Mid group has a pair"
        sum_PF[prompt] += [getattr(statistics, name) for name in FIGURES]
    return sum_PF
