"""The thread of a rollout stream: its event loop draws prompts, samples their groups and has them graded."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import threading
from collections.abc import Callable, Collection, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from megatron_dypo.data.prompts import DropCounts
from megatron_dypo.rollout.attempts import GroupDroppedError
from megatron_dypo.rollout.balance import NoServerError
from megatron_dypo.rollout.client import SGLangClient
from megatron_dypo.rollout.collect import DroppedGroup, dropped_group
from megatron_dypo.rollout.counts import ClientCounts
from megatron_dypo.rollout.groups import Planner, sample_group
from megatron_dypo.rollout.sampling import Sampling
from megatron_dypo.rollout.stream_state import StreamState
from megatron_dypo.types import Prompt, RolloutGroup

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StreamWork(Generic[T]):
    """The work of a stream: how prompts are drawn, and how their groups are finished."""

    claim: Callable[[int], Sequence[int]]
    """Takes at most that many next draws, and returns their orders. It must be quick: the stream calls it under its
    lock, so that other holders of the lock see each draw either not made or unfinished."""
    load: Callable[[Sequence[int]], tuple[Sequence[Prompt], DropCounts]]
    """Reads and tokenises the prompts of claimed orders in a worker thread, and counts those that it leaves out."""
    finish: Callable[[RolloutGroup], T]
    """Turns a group into an item that the stream returns, by grading it. A worker thread calls it, one group at a
    time."""
    is_useful: Callable[[T], bool]
    """Whether a finished group counts towards what is wanted."""
    planner: Planner | None = None
    """Gives the parts of each group; None: one request samples it."""
    recall: Callable[[Prompt], Callable[[], T | None] | None] | None = None
    """Returns a function that reads a group that was finished before, for a worker thread; None: there is none. It must
    be quick, and what it returns may find that the group does not count any more (None)."""


class StreamSampler(Generic[T]):
    """The event loop of a stream. ``changed`` is the lock of ``state``, and notifies threads that wait for a change.

    Args:
        oversample, max_unread: see :class:`megatron_dypo.rollout.stream.RolloutStream`.
    """

    def __init__(
        self,
        client: SGLangClient,
        sampling: Sampling,
        work: StreamWork[T],
        *,
        changed: threading.Condition,
        state: StreamState[T],
        oversample: float,
        max_unread: int | None,
    ) -> None:
        self._client, self._sampling, self._work = client, sampling, work
        self._changed, self._state = changed, state
        self._oversample, self._max_unread = oversample, max_unread
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: asyncio.Event | None = None

    def wake(self) -> None:
        """Make the loop look at the state again. Any thread may call it."""
        with self._changed:
            loop, wake = self._loop, self._wake
        if loop is not None and wake is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(wake.set)

    def run(self) -> None:
        """Sample until the state says stop; store an error in the state. This is the body of the stream's thread."""
        try:
            asyncio.run(self._collect())
        except BaseException as error:  # noqa: BLE001  handed to the trainer's thread, which raises it
            with self._changed:
                self._state.error = error
                self._changed.notify_all()

    async def _collect(self) -> None:
        wake = asyncio.Event()
        with self._changed:
            self._loop, self._wake = asyncio.get_running_loop(), wake
        groups: set[asyncio.Task[None]] = set()
        loading: asyncio.Task[list[Prompt]] | None = None
        counted = ClientCounts()
        with _worker("grading") as grader, _worker("tokenising") as reader:
            async with self._client:
                watch = asyncio.create_task(self._client.watch())
                try:
                    while not self._state.is_stopping:
                        wake.clear()
                        prompts = self._postponed_prompts()
                        if loading is None and (orders := self._claim_orders()):
                            loading = asyncio.create_task(self._loaded(orders, reader))
                        elif loading is not None and loading.done():
                            prompts += loading.result()
                            loading = None
                            wake.set()  # there may be room for more
                        groups |= {asyncio.create_task(self._group(prompt, grader)) for prompt in prompts}
                        await _first([*groups, watch, *([loading] if loading else [])], wake.wait())
                        groups -= _checked(groups)
                        _checked([watch])
                        counted = self._count_client(counted)
                finally:
                    for task in (*groups, watch):
                        task.cancel()
                    # Let loading finish, so that every claimed order is accounted for.
                    await asyncio.gather(*groups, watch, *([loading] if loading else []), return_exceptions=True)

    def _room(self) -> int:
        """Return how many more draws may be under way. Call it under the lock."""
        state = self._state
        room = math.ceil(self._oversample * (state.wanted - state.useful)) - state.under_way
        if self._max_unread is not None:
            room = min(room, self._max_unread - state.unread - state.under_way)
        return 0 if state.is_unserved else max(room, 0)

    def _postponed_prompts(self) -> list[Prompt]:
        with self._changed:
            state = self._state
            prompts = [state.postponed.popleft() for _ in range(min(self._room(), len(state.postponed)))]
            state.in_flight |= {prompt.order: prompt for prompt in prompts}
        return prompts

    def _claim_orders(self) -> list[int]:
        """Draw, and return the orders to load. Orders that an error kept from being loaded come first."""
        with self._changed:
            state = self._state
            if not state.is_unserved and not state.claimed and (room := self._room()):
                state.claimed += self._work.claim(room)
            return [] if state.is_unserved else list(state.claimed)

    async def _loaded(self, orders: Sequence[int], reader: ThreadPoolExecutor) -> list[Prompt]:
        return await asyncio.get_running_loop().run_in_executor(reader, self._load_claimed, orders)

    def _load_claimed(self, orders: Sequence[int]) -> list[Prompt]:
        prompts, left_out = self._work.load(orders)
        with self._changed:
            state = self._state
            state.claimed = []
            state.in_flight |= {prompt.order: prompt for prompt in prompts}
            state.counts.left_out += left_out
            self._changed.notify_all()
        return list(prompts)

    def _count_client(self, counted: ClientCounts) -> ClientCounts:
        now = self._client.counts()
        with self._changed:
            self._state.counts.client += now.since(counted)
        return now

    async def _group(self, prompt: Prompt, grader: ThreadPoolExecutor) -> None:
        finished: T | None = None
        dropped: DroppedGroup | None = None
        try:
            finished = await self._recalled(prompt, grader)
            if finished is None:
                finished = await self._sampled(prompt, grader)
        except GroupDroppedError as error:
            dropped = dropped_group(prompt, error)
        except NoServerError as error:
            self._postpone_unserved(prompt, error)
            return
        with self._changed:
            state = self._state
            state.in_flight.pop(prompt.order)
            if dropped is not None:
                state.counts.dropped.append(dropped)
            elif finished is not None:
                state.done.append((prompt.order, finished))
                state.useful += self._work.is_useful(finished)
            self._changed.notify_all()

    async def _recalled(self, prompt: Prompt, grader: ThreadPoolExecutor) -> T | None:
        recall = self._work.recall(prompt) if self._work.recall is not None else None
        return None if recall is None else await _in_worker(grader, recall)

    async def _sampled(self, prompt: Prompt, grader: ThreadPoolExecutor) -> T | None:
        group = await sample_group(self._client, prompt, self._sampling, planner=self._work.planner, worker=grader)
        return await _in_worker(grader, functools.partial(self._work.finish, group))

    def _postpone_unserved(self, prompt: Prompt, error: NoServerError) -> None:
        with self._changed:
            if not self._state.is_unserved:
                _log.warning("%s; waiting for a refit", error)
            self._state.is_unserved = True
            self._state.postponed.append(self._state.in_flight.pop(prompt.order))
            self._changed.notify_all()


def _worker(name: str) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)


async def _in_worker(worker: ThreadPoolExecutor, work: Callable[[], T | None]) -> T | None:
    """Return the result of ``work`` in a worker thread, even if this is cancelled after the thread has begun.

    The end of a stream waits for that thread in any case. Without its result, the group would be made again.
    """
    future = worker.submit(work)
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        result = None if future.cancel() else await asyncio.wrap_future(future)
        if result is None:
            raise
        return result


def _checked(tasks: Collection[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
    """Return the tasks that have ended; raise the error of one that failed."""
    ended = {task for task in tasks if task.done()}
    for task in ended:
        task.result()
    return ended


async def _first(tasks: Sequence[asyncio.Task[Any]], event: Coroutine[Any, Any, object]) -> None:
    """Wait until one of the tasks, or the event, is done."""
    waiter = asyncio.ensure_future(event)
    try:
        await asyncio.wait([*tasks, waiter], return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiter.cancel()
