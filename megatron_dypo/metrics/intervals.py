"""Confidence intervals of accuracies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def wilson_interval(accuracy: float, num_samples: int) -> tuple[float, float]:
    """Return the 95% Wilson score interval of a share of independent trials."""
    from scipy.stats import binomtest  # takes two seconds to import, and most ranks compute no interval

    interval = binomtest(round(accuracy * num_samples), num_samples).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def accuracy_interval(correct_P: Sequence[int], samples_P: Sequence[int]) -> tuple[float, float]:
    """Return the 95% interval of the accuracy over P prompts with several responses each.

    Responses to one prompt are similar, so they are not independent trials. The variance treats prompts as clusters.
    Wilson's interval is computed for the number of independent trials with that variance (Kish's effective sample
    size).

    Args:
        correct_P: [P] correct responses of each prompt.
        samples_P: [P] its responses, each at least 1.
    """
    correct, samples = np.asarray(correct_P, float), np.asarray(samples_P, float)
    total, prompts = samples.sum(), len(samples)
    accuracy = correct.sum() / total
    if total == prompts or prompts == 1:
        return wilson_interval(accuracy, int(total))
    residuals = (correct - accuracy * samples) / total
    variance = float((residuals**2).sum()) * prompts / (prompts - 1)
    spread = accuracy * (1 - accuracy)
    if spread == 0:  # all right or all wrong: the similarity of responses to one prompt is unknown
        return wilson_interval(accuracy, prompts)
    effective = spread / variance if variance > 0 else total
    return wilson_interval(accuracy, round(min(max(effective, 1.0), total)))
