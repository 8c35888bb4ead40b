"""The gate: Easy, Mid or Hard (paper, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_dypo.types import Tier


def grade_tier(is_correct_G: Sequence[bool] | npt.NDArray[np.bool_]) -> Tier:
    """Tier of a prompt from the correctness of its [G] rollouts: all → Easy, none → Hard, else Mid.

    The gate reads correctness, never a shaped reward: a value other than true, false, 0 and 1 is a ValueError, as is
    an empty group.

    >>> grade_tier([True, False])
    <Tier.MID: 'mid'>
    """
    flags_G = np.asarray(is_correct_G)
    if flags_G.ndim != 1 or flags_G.size == 0:
        raise ValueError(f"is_correct has shape {flags_G.shape}: must be one flag for each rollout of a group")
    if not np.isin(flags_G, (0, 1)).all():
        raise ValueError(f"is_correct={flags_G.tolist()}: must be flags, not rewards")
    num_correct = int(np.count_nonzero(flags_G))
    if num_correct == flags_G.size:
        return Tier.EASY
    return Tier.HARD if num_correct == 0 else Tier.MID
