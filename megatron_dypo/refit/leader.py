"""Calls to servers that the global leader makes while all other ranks wait for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from megatron_dypo.refit.control import SGLangControl
from megatron_dypo.refit.lockstep import Lockstep

T = TypeVar("T")
P = ParamSpec("P")


class Leader:
    """The global leader, as every rank sees it. Both methods are collective over the world."""

    def __init__(self, control: SGLangControl | None, lockstep: Lockstep) -> None:
        """``control``: on the global leader, None on the other ranks."""
        self.control = control
        self._lockstep = lockstep

    def run(self, action: Callable[Concatenate[SGLangControl, P], T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Run ``action`` with the control on the leader; returns its result there, None on the other ranks.

        Raises:
            RefitError: on all ranks, if it failed.
        """
        bound = functools.partial(action, self.control, *args, **kwargs) if self.control is not None else None
        return self._lockstep.run(bound)

    def ask(self, action: Callable[Concatenate[SGLangControl, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``action`` with the control on the leader; returns its result, which is not None, on every rank.

        Raises:
            RefitError: on all ranks, if it failed.
        """
        found = self.run(action, *args, **kwargs)
        return next(value for value in self._lockstep.gather(found) if value is not None)
