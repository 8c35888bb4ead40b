"""Calls to servers that only the global leader makes while all other ranks wait."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from megatron_dypo.refit.control import SGLangControl
from megatron_dypo.refit.lockstep import Lockstep

T = TypeVar("T")
P = ParamSpec("P")


class Leader:
    """The global leader as seen from every rank. Both methods are collective over the world."""

    def __init__(self, control: SGLangControl | None, lockstep: Lockstep) -> None:
        """``control`` is None except on the global leader."""
        self.control = control
        self._lockstep = lockstep

    def run(self, action: Callable[Concatenate[SGLangControl, P], T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Run ``action`` with the control on the leader; return its result there, and None on the other ranks.

        Raises:
            RefitError: on all ranks, if the action failed.
        """
        bound = functools.partial(action, self.control, *args, **kwargs) if self.control is not None else None
        return self._lockstep.run(bound)

    def ask(self, action: Callable[Concatenate[SGLangControl, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``action`` with the control on the leader; return its result, which must not be None, on every rank.

        Raises:
            RefitError: on all ranks, if the action failed.
        """
        found = self.run(action, *args, **kwargs)
        return next(value for value in self._lockstep.gather(found) if value is not None)
