"""Collection in the background: groups are sampled and finished in a thread while the trainer does something else.

The trainer says how many useful groups it still wants; the stream keeps that many (times ``oversample``) in flight, and
no more: the number of groups sampled ahead is bounded, and so is their age. No draw is lost: a prompt whose group was
not done when the stream stopped is the first to be sampled by the next one.

Three kinds of threads share the stream's state, and its lock guards it: the trainer's; the event loop's, which only
waits for answers; and two workers of the loop, one that reads and tokenises prompts and one that grades groups. Nothing
slow runs on the loop or under the lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
from collections.abc import Callable, Collection, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from megatron_dypo.data.prompts import DropCounts
from megatron_dypo.processes.stop_requests import StopFlag
from megatron_dypo.rollout.attempts import GroupDroppedError
from megatron_dypo.rollout.balance import NoServerError
from megatron_dypo.rollout.client import SGLangClient
from megatron_dypo.rollout.collect import DroppedGroup, dropped_group
from megatron_dypo.rollout.counts import ClientCounts
from megatron_dypo.rollout.responses import Sampling
from megatron_dypo.rollout.stream_state import StreamCounts, StreamState
from megatron_dypo.types import Prompt, RolloutGroup

T = TypeVar("T")

_log = logging.getLogger(__name__)


class RolloutStream(Generic[T]):
    """Groups of rollouts, sampled and finished in a thread of its own from :meth:`start` to :meth:`stop`.

    Args:
        client: the stream's thread alone sends requests with it.
        sampling: of every group.
        claim: takes the next draws, that many or fewer, and returns their orders. It must be quick: the stream calls it
            under its lock, so that whoever holds :meth:`still` sees every draw either not made or unfinished.
        load: reads and tokenises the prompts of claimed orders, in a worker thread. A prompt that it leaves out is in
            the :class:`DropCounts`.
        finish: makes of a group what :meth:`take` returns (grades it); called in a worker thread, one group at a time.
        is_useful: whether a finished group counts towards what is wanted.
        oversample: groups in flight for each group that is still wanted; at least 1.
        max_unread: draws of any outcome that :meth:`take` has not returned, at which nothing more is drawn; None: no
            limit. Without it a stream whose groups all fail would draw indefinitely while the trainer is busy.
        stop: ends every :meth:`wait` once it is set.
    """

    def __init__(
        self,
        client: SGLangClient,
        sampling: Sampling,
        *,
        claim: Callable[[int], Sequence[int]],
        load: Callable[[Sequence[int]], tuple[Sequence[Prompt], DropCounts]],
        finish: Callable[[RolloutGroup], T],
        is_useful: Callable[[T], bool],
        oversample: float = 1.0,
        max_unread: int | None = None,
        stop: StopFlag | None = None,
    ) -> None:
        self._client, self._sampling, self._claim, self._load = client, sampling, claim, load
        self._finish, self._is_useful, self._oversample = finish, is_useful, oversample
        self._max_unread, self._stop = max_unread, stop
        self._changed = threading.Condition()
        self._state: StreamState[T] = StreamState()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: asyncio.Event | None = None

    # The trainer's side.

    @property
    def error(self) -> BaseException | None:
        """The error that ended the stream's thread; None while all is well."""
        with self._changed:
            return self._state.error

    @property
    def is_unserved(self) -> bool:
        """No server is left to ask: nothing is drawn until :meth:`use_servers`."""
        with self._changed:
            return self._state.is_unserved

    @property
    def num_in_flight(self) -> int:
        """Draws that have not come to an end."""
        with self._changed:
            return self._state.under_way

    @property
    def num_unread(self) -> int:
        """Draws of any outcome that :meth:`take` would return."""
        with self._changed:
            return self._state.unread

    def start(self) -> None:
        """Begin to collect what is wanted; nothing if it runs already."""
        if self._thread is not None:
            return
        with self._changed:
            self._state.is_stopping, self._state.error = False, None
        self._thread = threading.Thread(target=self._run, name="rollout-stream", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Abort what is in flight; the next :meth:`start` samples it again. Idempotent."""
        if self._thread is None:
            return
        with self._changed:
            self._state.is_stopping = True
        self._notify_loop()
        self._thread.join()
        self._thread = None
        with self._changed:
            state = self._state
            state.postponed.extendleft(sorted(state.in_flight.values(), key=lambda prompt: -prompt.order))
            state.in_flight.clear()

    def use_servers(self, urls: Sequence[str], versions: range) -> None:
        """Send requests to ``urls`` from now on, as :meth:`SGLangClient.use_servers`; call it after a refit."""
        with self._changed:
            self._client.use_servers(urls, versions)
            self._state.is_unserved = False
        self._notify_loop()

    def accept(self, versions: range) -> None:
        """Accept groups of ``versions``, as :meth:`SGLangClient.accept`; call it before a refit."""
        self._client.accept(versions)

    def want(self, count: int) -> None:
        """Say how many useful groups are wanted from now on, those that :meth:`take` would return included."""
        with self._changed:
            self._state.wanted = count
        self._notify_loop()

    def wait(self, timeout_s: float, useful: int = 1, resolved: int = 2**31) -> None:
        """Wait until ``useful`` groups that count, or ``resolved`` draws of any outcome, can be taken.

        The wait also ends when no server is left, when ``stop`` is set, and after ``timeout_s``.

        Raises:
            ServerDiedError, ValueError: as :func:`megatron_dypo.rollout.collect.collect`.
        """

        def is_over() -> bool:
            state = self._state
            if state.useful >= useful or state.unread >= resolved or state.is_unserved or state.error is not None:
                return True
            return self._stop is not None and self._stop.is_set()

        waking = self._stop.calling(self._notify_waiters) if self._stop else contextlib.nullcontext()
        with waking, self._changed:
            self._changed.wait_for(is_over, timeout_s)
            if self._state.error is not None:
                raise self._state.error

    def take(self) -> tuple[list[T], StreamCounts]:
        """Return the finished groups, in the order of the draws, and the counts since the last call."""
        with self._changed:
            state = self._state
            done, state.done = sorted(state.done, key=lambda pair: pair[0]), []
            state.wanted, state.useful = max(0, state.wanted - state.useful), 0
            counts, state.counts = state.counts, StreamCounts()
        return [finished for _, finished in done], counts

    def still(self) -> contextlib.AbstractContextManager[object]:
        """Hold the stream's books: within the block nothing is drawn, and no group ends.

        The block may call :meth:`unfinished`: the lock is reentrant.
        """
        return self._changed

    def unfinished(self) -> list[int]:
        """Return the orders that were drawn and that :meth:`take` has not accounted for, ascending.

        A checkpoint stores them.
        """
        with self._changed:
            return self._state.unfinished()

    def postpone(self, prompts: Sequence[Prompt]) -> None:
        """Sample these before any other (a resumed run's unfinished ones). Only while the stream does not run."""
        assert self._thread is None, "the stream runs"
        with self._changed:
            self._state.postponed.extend(prompts)

    def _notify_waiters(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _notify_loop(self) -> None:
        with self._changed:
            loop, wake = self._loop, self._wake
        if loop is not None and wake is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(wake.set)

    # The stream's thread.

    def _run(self) -> None:
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
                    # Loading goes on to its end, so that what it reads is known to be drawn.
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
        """Draw; return the orders to load, those first that an error kept from being loaded."""
        with self._changed:
            state = self._state
            if not state.is_unserved and not state.claimed and (room := self._room()):
                state.claimed += self._claim(room)
            return [] if state.is_unserved else list(state.claimed)

    async def _loaded(self, orders: Sequence[int], reader: ThreadPoolExecutor) -> list[Prompt]:
        return await asyncio.get_running_loop().run_in_executor(reader, self._load_claimed, orders)

    def _load_claimed(self, orders: Sequence[int]) -> list[Prompt]:
        prompts, left_out = self._load(orders)
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
            rollouts = await self._client.generate(prompt.tokens, self._sampling)
            group = RolloutGroup(prompt=prompt, rollouts=rollouts)
            finished = await asyncio.get_running_loop().run_in_executor(grader, self._finish, group)
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
                state.useful += self._is_useful(finished)
            self._changed.notify_all()

    def _postpone_unserved(self, prompt: Prompt, error: NoServerError) -> None:
        with self._changed:
            if not self._state.is_unserved:
                _log.warning("%s; waiting for a push", error)
            self._state.is_unserved = True
            self._state.postponed.append(self._state.in_flight.pop(prompt.order))
            self._changed.notify_all()


def _worker(name: str) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)


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
