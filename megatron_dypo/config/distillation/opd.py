"""The section ``objective.opd``: on-policy distillation from a teacher's log-probs of the policy's own rollouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_dypo.checks import require_not_negative


@dataclass(frozen=True, kw_only=True)
class OpdConfig:
    """The advantage of a token: a·Â_i − λ·(log π − log π_T). ``teacher_servers`` names the servers of the teacher
    π_T."""

    kl_coef: float = 1.0
    """λ: weight of the reverse KL to the teacher."""
    reward_coef: float = 1.0
    """a: weight of the advantage Â_i that follows from the rewards of the group. 0: learn from the teacher alone."""
    estimator: Literal["clipped", "reinforce"] = "clipped"
    """``clipped``: π is π_old, and the advantage enters GRPO's clipped surrogate. ``reinforce``: π is the current π_θ,
    without gradient, and the advantage multiplies −log π_θ, without ratio or clip. ``objective.importance`` then
    corrects the advantage too; it needs the trainer's π_old (MOPD, arXiv 2601.02780, eq. 8, 9)."""

    def __post_init__(self) -> None:
        require_not_negative(self, "kl_coef", "reward_coef")
