"""Steps that all ranks take together. A failure of one rank is raised on all, and no rank waits indefinitely."""

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
    """A refit failed. It is raised on every rank, with the reasons of all ranks."""

    def __init__(self, message: str, lost: Iterable[str] = (), cause: Cause = Cause.SERVERS_GONE) -> None:
        super().__init__(message)
        self.cause = cause
        """The cause if this error ends the run: that of the first rank that failed."""
        self.lost = tuple(dict.fromkeys(lost))
        """URLs of the servers at fault, as far as the failed calls tell; the same on every rank."""


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """The failure of one rank, as it is sent to the other ranks."""

    reason: str
    urls: tuple[str, ...]
    """Servers at fault."""
    cause: Cause
    is_echo: bool
    """Whether the rank failed only because it was told of another rank's failure."""


class Lockstep:
    """All ranks of the world; in each step every rank runs one action at the same time."""

    def __init__(self, timeout_s: float) -> None:
        """Collective over the world. If a rank is lost, the others raise RuntimeError after at most ``timeout_s``."""
        self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))

    @overload
    def run(self, action: Callable[[], T]) -> T: ...

    @overload
    def run(self, action: Callable[[], T] | None = None) -> T | None: ...

    def run(self, action: Callable[[], T] | None = None) -> T | None:
        """Run ``action`` (None: only wait for the other ranks) and return its result. Collective over the world.

        Raises:
            RefitError: the action failed on some rank; the message names ranks and reasons.
            KeyboardInterrupt, SystemExit: this rank was interrupted; the other ranks get a RefitError.
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
        """Return the failures of all ranks: rank → failure, without those that another rank's failure caused."""
        try:
            if not self.total(int(failure is not None)):
                return {}
            failures = self.gather(failure)
        except RuntimeError as lost:
            if failure is None:
                raise
            raise RuntimeError(f"{failure.reason}; the other ranks did not report: {lost}") from error
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
    # Messages of these are clear without the name of the class. Those of others (a KeyError's key) are not.
    is_clear = isinstance(error, RuntimeError | ValueError | OSError) and bool(str(error))
    reason = str(error) if is_clear else f"{type(error).__name__}: {error}"
    return _Failure(reason=reason, urls=(), cause=cause_of(error), is_echo=isinstance(error, PeerFailedError))
