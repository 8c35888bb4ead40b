"""The section ``objective.opd``: on-policy distillation, by a teacher's log-probs of the policy's own rollouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_dypo.checks import require_not_negative


@dataclass(frozen=True, kw_only=True)
class OpdConfig:
    """The advantage of a token: a·Â_i − λ·(log π − log π_T). Servers of the teacher π_T are ``teacher_servers``."""

    kl_coef: float = 1.0
    """λ: weight of the reverse KL to the teacher."""
    reward_coef: float = 1.0
    """a: weight of the group's advantage Â_i by rewards. 0: the teacher alone."""
    estimator: Literal["clipped", "reinforce"] = "clipped"
    """``clipped``: π is π_old, and the advantage enters GRPO's clipped surrogate. ``reinforce``: π is π_θ as it is in
    each update, without gradient, and the advantage is the weight of −log π_θ, without ratio and clip; it is also
    weighted by ``objective.importance``, under which π_old is the trainer's (MOPD, arXiv 2601.02780, eq. 8, 9)."""

    def __post_init__(self) -> None:
        require_not_negative(self, "kl_coef", "reward_coef")
