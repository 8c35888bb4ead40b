"""How variances, covariance and signal-to-noise depend on k, on the normalisations and on the reference.

Each row changes one key of the setting. Rollouts are independent given the weights, so the same ones are grouped anew
for another k. Variances under different normalisations have different units; their quotients have none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from megatron_dypo.probe.gradients import NORMALIZATIONS, Setting, make_groups
from megatron_dypo.probe.mixing import estimate_moments
from megatron_dypo.probe.moments import make_products
from megatron_dypo.probe.resample import Tree
from megatron_dypo.probe.scores import Scores


def estimate_sensitivity(scores: Scores, setting: Setting, alpha: float, *, seed: int = 0) -> list[Tree]:
    """Return a row for each changed setting: the key, its value, and estimates over all prompts, gate included."""
    changes = list(_settings(scores, setting))
    # Each key has one row with its own value, and all of these rows are of the same setting.
    rows = {changed: _row(scores, changed, alpha, seed) for changed in dict.fromkeys(changed for _, changed in changes)}
    return [{"key": key, "value": getattr(changed, key), **rows[changed]} for key, changed in changes]


def _settings(scores: Scores, setting: Setting) -> Iterator[tuple[str, Setting]]:
    """Yield each key with the setting in which it has another value, or its own: k, 2, 4, 8, … ."""
    rollouts = int((scores.teacher_N < 0).sum())
    prompts = max(len(set(scores.prompt_N[scores.teacher_N < 0].tolist())), 1)
    size, sizes = 2, {setting.group_size}
    while 2 * size <= rollouts / prompts:  # at least two groups of a prompt
        sizes.add(size)
        size *= 2
    for group_size in sorted(sizes):
        yield "group_size", replace(setting, group_size=group_size)
    for name in NORMALIZATIONS:
        yield "length_normalization", replace(setting, length_normalization=name)
    for flag in (True, False):
        yield "normalize_std", replace(setting, normalize_std=flag)
    for reference in scores.log_ratio_N:
        yield "reference", replace(setting, reference=reference)


def _row(scores: Scores, setting: Setting, alpha: float, seed: int) -> Tree:
    groups = make_groups(scores, setting)
    found: Any = estimate_moments(make_products(scores, groups), alpha, "all", seed=seed)
    measured = max(int(groups.is_group_PR.sum()), 1)
    return {
        "mid_share": int(groups.is_mid_PR.sum()) / measured,
        "grpo": found["total"]["grpo"],
        "gal": found["total"]["gal"],
        "covariance": found["total"]["covariance"],
        "gal_to_grpo": found["ratios"]["gal_to_grpo"],
        "correlation": found["ratios"]["correlation"],
        "best_alpha": found["mix"]["best_alpha"],
        "snr_grpo": found["signal_to_noise"]["grpo"],
        "snr_gal": found["signal_to_noise"]["gal"],
    }
