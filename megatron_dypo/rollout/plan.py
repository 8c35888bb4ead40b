"""Plans of groups: rollouts are sampled all at once or in parts, from the prompt or after a teacher's tokens. Pure.

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
    """A part of a group: rollouts that one request samples."""

    count: int
    prefix: Tokens = field(default_factory=lambda: np.empty(0, np.int32))
    """[R] First tokens of a teacher's trace. Each response begins with them, and the policy goes on from there. Prefix
    and sampled tokens together are at most ``rollout.max_new_tokens``; at least one token is sampled."""
    is_whole: bool = False
    """Whether the prefix is a whole response. If so, nothing is sampled: each rollout of the part is the trace."""


NextParts: TypeAlias = Callable[[Sequence[Verdict]], Sequence[GroupPart]]
"""Verdicts of the rollouts so far, in their order → the parts to sample next; () once the group is complete."""


@dataclass(frozen=True, kw_only=True)
class GroupPlan:
    """The parts of one group. The members of the group are in the order of the parts."""

    first: Sequence[GroupPart]
    """Parts that are sampled first, at the same time. The policy samples at least one of them."""
    then: NextParts | None = None
    """Called once the rollouts so far are judged; None: no part waits for a verdict."""


def whole_group(count: int) -> GroupPlan:
    """Return the plan of a group whose ``count`` rollouts are sampled from the prompt by one request."""
    return GroupPlan(first=(GroupPart(count=count),))
