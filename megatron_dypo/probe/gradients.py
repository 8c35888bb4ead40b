"""Gradients of one prompt's L_GRPO, L_GAL and L_SFT from the scores of its trajectories. Suffixes: see ``scores.py``.

At the first update of a batch θ = θ_old and every ratio is 1. Without the KL term and clips

    ∇L_GRPO = −Σ_i Â_i·s_i / (k·div_i)        ∇L_GAL = Σ_i c_i·s_i / div_i        ∇L_SFT = −s / div

where div is the length divisor and c_i = ∂L_GAL/∂ℓ_i at ℓ_i = log-ratio_i / div_i. The factor 1/n of the update, which
is the mean over prompts, is not in them. Advantages and coefficients are computed by the trainer's own functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_dypo.checks import require, require_positive
from megatron_dypo.objective.advantage import group_advantages
from megatron_dypo.objective.gal import gal_coefficients
from megatron_dypo.probe.scores import Floats, Integers, Scores

LengthNormalization = Literal["sum", "sequence_mean", "token_mean", "group_mean", "constant"]
NORMALIZATIONS: tuple[LengthNormalization, ...] = get_args(LengthNormalization)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The keys of the objective that the gradients depend on; each has the meaning of its key in ``objective``."""

    group_size: int
    """k. If it is not that of the measured groups, the rollouts of a prompt are grouped anew, in order."""
    length_normalization: LengthNormalization = "sequence_mean"
    normalize_std: bool = True
    advantage_epsilon: float = 1e-6
    constant_length: int = 8192
    reference: str = "frozen"
    """The reference that GAL's log-ratios are against: a key of ``Scores.log_ratio_N``."""
    beta_gal: float = 1.0

    def __post_init__(self) -> None:
        require(self.group_size >= 2, f"group_size={self.group_size}", "must be at least 2")
        require_positive(self, "advantage_epsilon", "constant_length", "beta_gal")
        name = self.length_normalization
        require(name in NORMALIZATIONS, f"length_normalization={name}", f"must be one of {', '.join(NORMALIZATIONS)}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Groups:
    """The groups of k rollouts of each prompt, and the weight of each score in the group's gradients.

    Prompts may have different numbers of groups; the entries beyond are empty.
    """

    index_PRk: Integers
    """Index of each member into the trajectories; −1 in an empty entry."""
    is_group_PR: NDArray[np.bool_]
    """False in an empty entry."""
    is_mid_PR: NDArray[np.bool_]
    is_hard_PR: NDArray[np.bool_]
    grpo_PRk: Floats
    """−Â_i / (k·div_i); 0 unless the group is Mid."""
    gal_PRk: Floats
    """c_i / div_i; 0 unless the group is Mid."""
    log_ratio_PRk: Floats
    """ℓ_i / div_i."""
    length_PRk: Integers

    @property
    def num_prompts(self) -> int:
        return len(self.index_PRk)


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptGradients:
    """The gradients of all groups of one prompt; zero vectors for groups that are not Mid."""

    grpo_Rd: Floats
    gal_Rd: Floats


def make_groups(scores: Scores, setting: Setting) -> Groups:
    """Form groups of k rollouts of each prompt and compute their weights.

    The rollouts of a prompt are independent given the weights, so the n rollouts of a prompt, in the order of their
    repetitions, make floor(n/k) groups of any size k.

    Raises:
        ValueError: the reference has no log-ratios.
    """
    known = ", ".join(scores.log_ratio_N)
    require(setting.reference in scores.log_ratio_N, f"reference={setting.reference}", f"must be one of {known}")
    index_PRk = _member_indices(scores, setting.group_size)
    is_group_PR = index_PRk[..., 0] >= 0
    correct_PR = scores.is_correct_N[index_PRk].sum(axis=2)
    is_mid_PR = is_group_PR & (correct_PR > 0) & (correct_PR < setting.group_size)
    length_PRk = np.where(is_group_PR[..., None], scores.length_N[index_PRk], 0)
    divisor_PRk = _divisors(length_PRk, is_mid_PR, setting)
    log_ratio_PRk = scores.log_ratio_N[setting.reference][index_PRk] / divisor_PRk
    grpo_PRk, gal_PRk = np.zeros(index_PRk.shape), np.zeros(index_PRk.shape)
    for at in map(tuple, np.argwhere(is_mid_PR)):
        members_k = index_PRk[at]
        advantage_k = _advantages(scores.reward_N[members_k], setting)
        grpo_PRk[at] = -advantage_k / (setting.group_size * divisor_PRk[at])
        coef_k = _coefficients(log_ratio_PRk[at], scores.is_correct_N[members_k], setting)
        gal_PRk[at] = coef_k / divisor_PRk[at]
    return Groups(
        index_PRk=index_PRk,
        is_group_PR=is_group_PR,
        is_mid_PR=is_mid_PR,
        is_hard_PR=is_group_PR & (correct_PR == 0),
        grpo_PRk=grpo_PRk,
        gal_PRk=gal_PRk,
        log_ratio_PRk=log_ratio_PRk,
        length_PRk=length_PRk,
    )


def prompt_gradients(scores: Scores, groups: Groups) -> Iterator[PromptGradients]:
    """Yield the gradients of one prompt after the other, so that only one prompt's are in memory."""
    for index_Rk, grpo_Rk, gal_Rk in zip(groups.index_PRk, groups.grpo_PRk, groups.gal_PRk, strict=True):
        score_Rkd = scores.score_Nd[index_Rk].astype(np.float64)
        yield PromptGradients(
            grpo_Rd=np.einsum("rk,rkd->rd", grpo_Rk, score_Rkd), gal_Rd=np.einsum("rk,rkd->rd", gal_Rk, score_Rkd)
        )


def sft_gradients(scores: Scores, setting: Setting) -> tuple[Floats, NDArray[np.bool_]]:
    """Return the gradient of L_SFT for each prompt and teacher, a mean over the teacher's traces of the prompt.

    Returns:
        [P, M, d] gradients, zero where there is no trace; [P, M] whether there is one.
    """
    shape = (len(scores.prompt_ids), len(scores.teachers))
    total_PMd, count_PM = np.zeros((*shape, scores.score_Nd.shape[1])), np.zeros(shape)
    trace_T = np.flatnonzero(scores.teacher_N >= 0)
    length_T = np.maximum(scores.length_N[trace_T], 1).astype(np.float64)
    match setting.length_normalization:
        case "sum":
            length_T[:] = 1.0
        case "token_mean" if len(length_T):
            length_T[:] = max(scores.length_N[trace_T].mean(), 1.0)
        case "constant":
            length_T[:] = setting.constant_length
    at = (scores.prompt_N[trace_T], scores.teacher_N[trace_T])
    np.add.at(total_PMd, at, -scores.score_Nd[trace_T].astype(np.float64) / length_T[:, None])
    np.add.at(count_PM, at, 1.0)
    return total_PMd / np.maximum(count_PM, 1.0)[..., None], count_PM > 0


def _member_indices(scores: Scores, group_size: int) -> Integers:
    """Return [P, R, k] indices of the rollouts, groups in the order of the repetitions; −1 where there is no group."""
    rollout_N = np.flatnonzero(scores.teacher_N < 0)
    order_N = rollout_N[np.lexsort((scores.repeat_N[rollout_N], scores.prompt_N[rollout_N]))]
    prompt_N = scores.prompt_N[order_N]
    count_P = np.bincount(prompt_N, minlength=len(scores.prompt_ids))
    place_N = np.arange(len(order_N)) - (np.cumsum(count_P) - count_P)[prompt_N]
    groups_P = count_P // group_size
    kept_N = place_N < (groups_P * group_size)[prompt_N]
    index_PRk = np.full((len(count_P), int(groups_P.max(initial=0)), group_size), -1, dtype=np.int64)
    place_N = place_N[kept_N]
    index_PRk[prompt_N[kept_N], place_N // group_size, place_N % group_size] = order_N[kept_N]
    return index_PRk


def _divisors(length_PRk: Integers, is_mid_PR: NDArray[np.bool_], setting: Setting) -> Floats:
    """Return the divisor of each rollout's token sum, that of :func:`token_weights.length_divisor`.

    ``token_mean`` takes the mean length of the rollouts of all Mid groups, as if they were the rollouts of one update.
    """
    shape = length_PRk.shape
    match setting.length_normalization:
        case "sum":
            return np.ones(shape)
        case "sequence_mean":
            return np.maximum(length_PRk, 1).astype(np.float64)
        case "group_mean":
            return np.broadcast_to(np.maximum(length_PRk.mean(axis=2, keepdims=True), 1.0), shape)
        case "token_mean":
            return np.full(shape, max(length_PRk[is_mid_PR].mean(), 1.0) if is_mid_PR.any() else 1.0)
        case "constant":
            return np.full(shape, float(setting.constant_length))


def _advantages(reward_k: Floats, setting: Setting) -> Floats:
    found = group_advantages(
        torch.from_numpy(reward_k), normalize_std=setting.normalize_std, epsilon=setting.advantage_epsilon
    )
    return np.asarray(found.numpy(), dtype=np.float64)


def _coefficients(log_ratio_k: Floats, is_correct_k: NDArray[np.bool_], setting: Setting) -> Floats:
    found = gal_coefficients(torch.from_numpy(log_ratio_k), torch.from_numpy(is_correct_k), setting.beta_gal)
    return np.asarray(found.numpy(), dtype=np.float64)
