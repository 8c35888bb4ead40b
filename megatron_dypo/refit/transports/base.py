"""What every way of moving weights shares: the source of tensors, steps taken by all ranks together, the interface."""

from __future__ import annotations

import datetime
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dypo.ending import Cause, cause_of
from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.families.registry import match
from megatron_dypo.models.gather import iter_hf_tensors, sent_params, written_specs
from megatron_dypo.models.hf.write import TensorSpec
from megatron_dypo.parallel.layout import Layout
from megatron_dypo.refit.control import ServerError
from megatron_dypo.refit.deadline import Deadline

T = TypeVar("T")


class RefitError(RuntimeError):
    """A refit failed; raised on every rank with the reasons of all of them."""

    def __init__(self, message: str, lost: Iterable[str] = (), cause: Cause = Cause.SERVERS_GONE) -> None:
        super().__init__(message)
        self.cause = cause
        """Why a run that this error ends does end: that of the first rank that failed."""
        self.lost = tuple(dict.fromkeys(lost))
        """URLs of the servers to blame, as far as the failed calls tell; the same on every rank."""


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """What went wrong on one rank, as the others are told."""

    reason: str
    urls: tuple[str, ...]
    """Servers to blame."""
    cause: Cause


@dataclass(frozen=True, kw_only=True)
class Source:
    """The policy as this rank holds it."""

    layout: Layout
    arch: Architecture
    named_params: Callable[[], Iterable[tuple[str, Tensor]]]
    """Megatron-Core names with global layer indices, this rank's shards."""

    @property
    def turns(self) -> list[tuple[int, int]]:
        """(stage, expert rank) in the order in which ranks send; a stage's leader sends its dense tensors in the first
        turn of the stage, and its own experts with them."""
        return list(itertools.product(range(self.layout.pipeline), range(self.layout.expert)))

    @property
    def own_turn(self) -> tuple[int, int] | None:
        """The turn in which whole tensors leave this rank; None on a rank that only helps to make them whole, or less."""
        layout = self.layout
        return (layout.pp_rank, layout.ep_rank) if layout.leads_stage or layout.leads_experts else None

    def joins(self, turn: tuple[int, int]) -> bool:
        """Whether this rank has a part in a turn: its stage's first, in which dense tensors are gathered, or that of its
        experts."""
        layout = self.layout
        is_of_experts = layout.sends_experts and turn == (layout.pp_rank, layout.ep_rank)
        return is_of_experts or (layout.sends_dense and turn == (layout.pp_rank, 0))

    def params(self, turn: tuple[int, int] | None = None) -> list[tuple[str, Tensor]]:
        """This rank's parameters that are sent, in one turn or (None) in all of them."""
        sent = sent_params(self.named_params(), self.arch, self.layout)
        if turn is None:
            return sent
        own, first = (self.layout.pp_rank, self.layout.ep_rank), (self.layout.pp_rank, 0)
        return [(n, p) for n, p in sent if (own if match(n, self.arch).is_expert else first) == turn]

    def tensors(self, turn: tuple[int, int] | None = None) -> Iterator[tuple[str, Tensor]]:
        """HF tensors that leave this rank, one at a time, in one turn or (None) in all of them. Collective over
        the ranks that join the turn (None: over all senders of a stage), which exhaust it together."""
        return iter_hf_tensors(self.params(turn), self.arch, self.layout)

    def specs(self) -> list[TensorSpec]:
        """What :meth:`tensors` yields here."""
        return written_specs(self.params(), self.arch, self.layout)


class Lockstep:
    """Steps that all ranks take together: what fails on one is raised on all, and none waits indefinitely."""

    def __init__(self, timeout_s: float) -> None:
        """Collective over the world. A lost rank is a RuntimeError on the others after at most ``timeout_s``."""
        self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))

    def run(self, action: Callable[[], T] | None = None) -> T | None:
        """Run ``action`` here (None: only wait for the others).

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
        """What failed on all ranks: rank → failure."""
        try:
            if not self.total(int(failure is not None)):
                return {}
            failures = self.gather(failure)
        except RuntimeError as lost:
            if failure is None:
                raise
            raise RuntimeError(f"{failure.reason}; and no word of the other ranks: {lost}") from error
        return {rank: found for rank, found in enumerate(failures) if found is not None}

    def total(self, value: int) -> int:
        """The sum over all ranks."""
        value_1 = torch.tensor([value])
        dist.all_reduce(value_1, group=self._group)
        return int(value_1)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        values: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values


class Transport(ABC):
    """A way from the trainer's shards into the servers' parameters; servers are paused when it is used."""

    in_session = True
    """Whether SGLang wants the update between ``begin_weight_update`` and ``end_weight_update``."""

    @abstractmethod
    def send(self, version: int, deadline: Deadline) -> int:
        """Bring every tensor to every server; returns the bytes that this rank sent or wrote. Collective.

        Raises:
            RefitError: on every rank, with some servers changed and some not.
        """

    @abstractmethod
    def reset(self) -> None:
        """Forget all connections after a failed attempt, at once, so that the next one makes new ones. Not collective."""

    @abstractmethod
    def close(self) -> None:
        """Leave the servers in order: at the end of a run, or before a refit to other ones, which connects anew. Not
        collective."""


def _failure(error: BaseException) -> _Failure:
    if isinstance(error, ServerError):
        return _Failure(reason=str(error), urls=error.urls, cause=Cause.SERVERS_GONE)
    # These speak for themselves, if they say anything; the text of others (a KeyError's key) needs the name.
    is_clear = isinstance(error, RuntimeError | ValueError | OSError) and bool(str(error))
    reason = str(error) if is_clear else f"{type(error).__name__}: {error}"
    return _Failure(reason=reason, urls=(), cause=cause_of(error))
