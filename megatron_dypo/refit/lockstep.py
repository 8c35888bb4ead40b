"""Steps that all ranks take together: what fails on one rank is raised on all, and none waits indefinitely."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import torch
import torch.distributed as dist

from megatron_dypo.ending import Cause, cause_of
from megatron_dypo.models.gather import PeerFailedError
from megatron_dypo.refit.answers import ServerError

T = TypeVar("T")


class RefitError(RuntimeError):
    """A refit failed; raised on every rank with the reasons of all of them."""

    def __init__(self, message: str, lost: Iterable[str] = (), cause: Cause = Cause.SERVERS_GONE) -> None:
        super().__init__(message)
        self.cause = cause
        """Cause of the end of a run that this error ends: the cause on the first rank that failed."""
        self.lost = tuple(dict.fromkeys(lost))
        """URLs of the servers to blame, as far as the failed calls tell; the same on every rank."""


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """The failure of one rank, as the other ranks are told of it."""

    reason: str
    urls: tuple[str, ...]
    """Servers to blame."""
    cause: Cause
    is_echo: bool
    """Whether the rank only heard of another rank's failure, which has the reason."""


class Lockstep:
    """The world's ranks, which run one action each at the same time."""

    def __init__(self, timeout_s: float) -> None:
        """Collective over the world. A lost rank is a RuntimeError on the others after at most ``timeout_s``."""
        self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))

    @overload
    def run(self, action: Callable[[], T]) -> T: ...

    @overload
    def run(self, action: Callable[[], T] | None = None) -> T | None: ...

    def run(self, action: Callable[[], T] | None = None) -> T | None:
        """Run ``action`` here (None: only wait for the other ranks) and return its result. Collective over the world.

        Raises:
            RefitError: it failed here or elsewhere; the message names ranks and reasons.
            KeyboardInterrupt, SystemExit: it was interrupted here; the other ranks get a RefitError.
            RuntimeError: a rank was lost.
        """
        result, error = None, None
        if action is not None:
            try:
                result = action()
            except BaseException as caught:  # noqa: BLE001, raised below, on all ranks: they wait for this one
                error = caught
        failures = self._share(None if error is None else _failure(error), error)
        if error is not None and not isinstance(error, Exception):
            raise error
        if failures:
            message = "; ".join(f"rank {rank}: {failure.reason}" for rank, failure in failures.items())
            urls = [url for failure in failures.values() for url in failure.urls]
            raise RefitError(message, urls, next(iter(failures.values())).cause) from error
        return result

    def _share(self, failure: _Failure | None, error: BaseException | None) -> dict[int, _Failure]:
        """Return the failures of all ranks, rank → failure, without mere echoes of another rank's."""
        try:
            if not self.total(int(failure is not None)):
                return {}
            failures = self.gather(failure)
        except RuntimeError as lost:
            if failure is None:
                raise
            raise RuntimeError(f"{failure.reason}; and no word of the other ranks: {lost}") from error
        found = {rank: failure for rank, failure in enumerate(failures) if failure is not None}
        return {rank: failure for rank, failure in found.items() if not failure.is_echo} or found

    def total(self, value: int) -> int:
        """Return the sum over all ranks."""
        value_1 = torch.tensor([value])
        dist.all_reduce(value_1, group=self._group)
        return int(value_1)

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, on every rank."""
        values: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values


def _failure(error: BaseException) -> _Failure:
    if isinstance(error, ServerError):
        return _Failure(reason=str(error), urls=error.urls, cause=Cause.SERVERS_GONE, is_echo=False)
    # These speak for themselves, if they say anything; the text of others (a KeyError's key) needs the name.
    is_clear = isinstance(error, RuntimeError | ValueError | OSError) and bool(str(error))
    reason = str(error) if is_clear else f"{type(error).__name__}: {error}"
    return _Failure(reason=reason, urls=(), cause=cause_of(error), is_echo=isinstance(error, PeerFailedError))
