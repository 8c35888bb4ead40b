"""A population of prompts with known moments, for the tests of the probe; naive, in float64.

``gradients`` alone is computed by the package.

Rollouts of prompt q are correct with chance p_q. A score is (correct − p_q)·(u + z_q) + noise, longer responses have
more noise, and the log-ratio against the frozen reference leans towards the correct ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dypo.probe.gradients import Setting, make_groups, prompt_gradients
from megatron_dypo.probe.scores import Floats, Scores


@dataclass(frozen=True, kw_only=True)
class Population:
    """Parameters of the draws."""

    dimensions: int = 6
    signal: float = 1.0
    """Length of u."""
    prompt_sd: float = 0.4
    """Standard deviation of each coordinate of z_q."""
    noise_sd: float = 0.3
    lean: float = 1.0
    """Mean log-ratio of a correct rollout minus that of a wrong one."""
    low: float = 0.1
    """Smallest p_q; p_q is uniform up to ``high``."""
    high: float = 0.9


def draw_rollouts(
    rng: np.random.Generator, population: Population, *, prompts: int, repeats: int, group_size: int
) -> dict[str, Any]:
    """Return arrays [P, R, k] (and score [P, R, k, d]) of rollouts of new prompts."""
    shape, d = (prompts, repeats, group_size), population.dimensions
    chance = rng.uniform(population.low, population.high, (prompts, 1, 1))
    direction = np.zeros(d)
    direction[0] = population.signal
    prompt_part = direction + population.prompt_sd * rng.standard_normal((prompts, 1, 1, d))
    correct = rng.random(shape) < chance
    length = 1 + rng.poisson(6, shape)
    noise = population.noise_sd * np.sqrt(length)[..., None] * rng.standard_normal((*shape, d))
    score = (correct - chance)[..., None] * prompt_part + noise
    log_ratio = population.lean * (correct - 0.5) + 0.7 * rng.standard_normal(shape)
    return {"correct": correct, "length": length, "score": score, "log_ratio": log_ratio}


def to_scores(drawn: dict[str, Any], *, traces: np.ndarray | None = None) -> Scores:
    """Return the draws as :class:`Scores`; ``traces`` [P, M, d] has the score of each teacher's trace, or NaN."""
    prompts, repeats, group_size = drawn["correct"].shape
    size = drawn["correct"].size
    prompt, repeat, _ = np.indices((prompts, repeats, group_size)).reshape(3, size)
    correct = drawn["correct"].ravel()
    scores = Scores(
        score_Nd=drawn["score"].reshape(size, -1).astype(np.float32),
        prompt_N=prompt.astype(np.int64),
        repeat_N=repeat.astype(np.int64),
        teacher_N=np.full(size, -1),
        is_correct_N=correct,
        reward_N=correct.astype(np.float64),
        length_N=drawn["length"].ravel().astype(np.int64),
        log_ratio_N={"old": np.zeros(size), "frozen": drawn["log_ratio"].ravel()},
        prompt_ids=tuple(f"prompt-{index}" for index in range(prompts)),
        teachers=(),
        step=3,
    )
    return scores if traces is None else with_traces(scores, traces)


def with_traces(scores: Scores, traces: np.ndarray, *, names: tuple[str, ...] | None = None) -> Scores:
    """Add one trace of length 4 with the given score for each prompt and teacher [P, M, d]; none where it is NaN."""
    prompt, teacher = (axis.astype(np.int64) for axis in np.nonzero(np.isfinite(traces[..., 0])))
    count = len(prompt)
    parts = {
        "score_Nd": traces[prompt, teacher].astype(np.float32),
        "prompt_N": prompt,
        "repeat_N": np.full(count, -1),
        "teacher_N": teacher,
        "is_correct_N": np.ones(count, dtype=bool),
        "reward_N": np.ones(count),
        "length_N": np.full(count, 4),
    }
    joined = {name: np.concatenate([getattr(scores, name), part]) for name, part in parts.items()}
    ratios = {name: np.concatenate([array, np.zeros(count)]) for name, array in scores.log_ratio_N.items()}
    teachers = names or tuple(f"teacher-{index}" for index in range(traces.shape[1]))
    changes: dict[str, Any] = {**joined, "log_ratio_N": ratios, "teachers": teachers}
    return replace(scores, **changes)


def take(scores: Scores, index: np.ndarray) -> Scores:
    """Return the trajectories with these indices, in this order."""
    names = ("score_Nd", "prompt_N", "repeat_N", "teacher_N", "is_correct_N", "reward_N", "length_N")
    changes: dict[str, Any] = {name: getattr(scores, name)[index] for name in names}
    changes["log_ratio_N"] = {name: array[index] for name, array in scores.log_ratio_N.items()}
    return replace(scores, **changes)


def naive_gradients(
    drawn: dict[str, Any], *, divide_by_length: bool = True, normalize_std: bool = True, beta: float = 1.0
) -> dict[str, np.ndarray]:
    """Return the gradients [P, R, d] of L_GRPO and L_GAL against the frozen reference, zero unless Mid, and is_mid."""
    correct, score = drawn["correct"], drawn["score"]
    divisor = drawn["length"] if divide_by_length else np.ones_like(drawn["length"])
    k = correct.shape[-1]
    is_mid = correct.any(-1) & ~correct.all(-1)
    reward = correct.astype(np.float64)
    advantage = reward - reward.mean(-1, keepdims=True)
    if normalize_std:
        advantage = advantage / (reward.std(-1, ddof=1, keepdims=True) + 1e-6)
    grpo = -((advantage / divisor)[..., None] * score).mean(-2)
    scaled = drawn["log_ratio"] / divisor
    pair = correct[..., :, None] & ~correct[..., None, :]
    weight = pair / (1 + np.exp(beta * (scaled[..., :, None] - scaled[..., None, :])))
    difference = (score / divisor[..., None])[..., :, None, :] - (score / divisor[..., None])[..., None, :, :]
    pairs = np.maximum(pair.sum((-1, -2)), 1)
    gal = -beta * np.einsum("...sf,...sfd->...d", weight, difference) / pairs[..., None]
    assert k >= 2
    eta = (weight**2).sum((-1, -2)) / pairs
    return {"grpo": grpo * is_mid[..., None], "gal": gal * is_mid[..., None], "is_mid": is_mid, "eta": eta}


def weighted_moments(found: dict[str, np.ndarray], *, given_mid: bool) -> dict[str, dict[str, float]]:
    """Return total, within, between and mean products of many prompts' gradients [P, R, d], as a population has them.

    Biased by 1/P, so for many prompts alone. A prompt counts as often as it is Mid, if ``given_mid``.
    """
    share = found["is_mid"].astype(np.float64) if given_mid else np.ones(found["is_mid"].shape)
    count = share.sum(1)
    kept = count >= 2
    result: dict[str, dict[str, float]] = {"total": {}, "within_prompts": {}, "between_prompts": {}, "squared_mean": {}}
    for name, a, b in (("grpo", "grpo", "grpo"), ("gal", "gal", "gal"), ("covariance", "grpo", "gal")):
        first, second = found[a], found[b]
        means = [(one * share[..., None]).sum((0, 1)) / share.sum() for one in (first, second)]
        mean = float(means[0] @ means[1])
        total = float(((first * second).sum(-1) * share).sum() / share.sum()) - mean
        part = share[kept]
        own = [
            (one[kept] * part[..., None]).sum(1, keepdims=True) / count[kept][:, None, None] for one in (first, second)
        ]
        products = ((first[kept] - own[0]) * (second[kept] - own[1])).sum(-1)
        variance = (products * part).sum(1) / (count[kept] - 1)
        within = float((variance * count[kept]).sum() / count[kept].sum())
        result["total"][name], result["within_prompts"][name] = total, within
        result["between_prompts"][name], result["squared_mean"][name] = total - within, mean
    return result


def mixed(parts: dict[str, float], alpha: float) -> float:
    """Return the moment of α·GRPO + (1 − α)·GAL."""
    rest = 1 - alpha
    return alpha**2 * parts["grpo"] + rest**2 * parts["gal"] + 2 * alpha * rest * parts["covariance"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Gradients:
    """The gradients of all groups of all prompts; zero vectors for groups that are not Mid."""

    grpo_PRd: Floats
    gal_PRd: Floats
    is_mid_PR: NDArray[np.bool_]
    is_hard_PR: NDArray[np.bool_]
    is_group_PR: NDArray[np.bool_]


def gradients(scores: Scores, setting: Setting) -> Gradients:
    """Return the gradient of every group, by the package."""
    groups = make_groups(scores, setting)
    shape = (*groups.is_group_PR.shape, scores.score_Nd.shape[1])
    grpo_PRd, gal_PRd = np.zeros(shape), np.zeros(shape)
    for prompt, one in enumerate(prompt_gradients(scores, groups)):
        grpo_PRd[prompt], gal_PRd[prompt] = one.grpo_Rd, one.gal_Rd
    return Gradients(
        grpo_PRd=grpo_PRd,
        gal_PRd=gal_PRd,
        is_mid_PR=groups.is_mid_PR,
        is_hard_PR=groups.is_hard_PR,
        is_group_PR=groups.is_group_PR,
    )
