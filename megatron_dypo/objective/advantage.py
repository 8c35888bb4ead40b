"""Group-relative advantages (paper, eq. 21). Pure. Shape legend: G members of a group."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(reward_G: Tensor, *, normalize_std: bool = True, epsilon: float = 1e-6) -> Tensor:
    """Return Â_i = (R_i − mean R) / (std R + ξ) within one group.

    Args:
        reward_G: [G] rewards of the group's rollouts.
        normalize_std: divide by the group's sample standard deviation (``torch.std``), as implementations of GRPO do;
            False: only subtract the mean (Dr. GRPO).
        epsilon: ξ.

    Returns:
        [G], of ``reward_G``'s type; all zero where the rewards are equal.

    Raises:
        ValueError: not one dimension, or fewer than two members.
    """
    if reward_G.dim() != 1 or len(reward_G) < 2:
        raise ValueError(f"reward_G of shape {tuple(reward_G.shape)}: must be one group of at least 2 rewards")
    if bool((reward_G == reward_G[0]).all()):  # exactly zero: 1/ξ would enlarge the rounding error of the mean
        return torch.zeros_like(reward_G)
    centred_G = reward_G - reward_G.mean()
    return centred_G / (reward_G.std() + epsilon) if normalize_std else centred_G
