"""Plans of groups: rollouts are sampled at once or in parts, from the prompt or from a teacher's first tokens. Pure.

An objective gives the plan of each prompt; :mod:`megatron_dypo.rollout.groups` carries it out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from megatron_dypo.types import Tokens, Verdict


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupPart:
    """Rollouts of a group that one request samples."""

    count: int
    prefix: Tokens = field(default_factory=lambda: np.empty(0, np.int32))
    """[R] A teacher's first tokens, which each response begins with; the policy goes on from there. They and what is
    sampled are at most ``rollout.max_new_tokens``, of which one at least is sampled."""
    is_whole: bool = False
    """The prefix is a whole response: nothing is sampled, and each rollout of the part is the teacher's trace."""


NextParts: TypeAlias = Callable[[Sequence[Verdict]], Sequence[GroupPart]]
"""Verdicts of the rollouts so far, in their order → the parts to sample next; () where the group is whole."""


@dataclass(frozen=True, kw_only=True)
class GroupPlan:
    """The parts of one group. Its members are in the order of the parts."""

    first: Sequence[GroupPart]
    """Sampled at the same time; one of them at least is sampled by the policy."""
    then: NextParts | None = None
    """Asked once the rollouts so far are judged; None: no part waits for a verdict."""


def whole_group(count: int) -> GroupPlan:
    """Return the plan of a group whose ``count`` rollouts are sampled from the prompt by one request."""
    return GroupPlan(first=(GroupPart(count=count),))
