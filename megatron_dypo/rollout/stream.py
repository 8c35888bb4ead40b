"""Collection in the background: groups are sampled and finished in a thread while the trainer does something else.

The trainer says how many useful groups it still wants; the stream keeps that many (times ``oversample``) in flight, and
no more: what is sampled ahead is bounded, and so is its age. Nothing drawn is lost: a prompt whose group was not done
when the stream stopped is the first to be drawn by the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from megatron_dypo.metrics.logs import warn_often
from megatron_dypo.rollout.balance import NoServerError
from megatron_dypo.rollout.client import GroupDroppedError, SGLangClient
from megatron_dypo.rollout.collect import DroppedGroup
from megatron_dypo.rollout.counts import ClientCounts
from megatron_dypo.rollout.responses import Sampling
from megatron_dypo.types import Prompt, RolloutGroup

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class StreamCounts:
    """What happened since the counts were last taken."""

    dropped: list[DroppedGroup] = field(default_factory=list)
    """Prompts without a group, with the reason."""
    client: ClientCounts = field(default_factory=ClientCounts)
    """What the client counted."""


@dataclass(kw_only=True)
class _State(Generic[T]):
    """Shared by the trainer's thread and the stream's; guarded by the stream's lock."""

    wanted: int = 0
    in_flight: dict[int, Prompt] = field(default_factory=dict)
    done: list[tuple[int, T]] = field(default_factory=list)
    """(order, finished group)."""
    useful: int = 0
    """Groups of ``done`` that count towards ``wanted``."""
    counts: StreamCounts = field(default_factory=StreamCounts)
    is_unserved: bool = False
    error: BaseException | None = None

    @property
    def unread(self) -> int:
        """Groups of any kind that have ended and were not taken."""
        return len(self.done) + len(self.counts.dropped)


class RolloutStream(Generic[T]):
    """Groups of rollouts, sampled and finished in a thread of its own from :meth:`start` to :meth:`stop`.

    Args:
        client: used by the stream's thread alone while it runs.
        sampling: of every group.
        draw: gives the next prompts, as many as asked for or fewer; called in the stream's thread.
        finish: makes of a group what :meth:`take` returns (grades it); called in a worker thread, one group at a time.
        is_useful: whether a finished group counts towards what is wanted.
        oversample: groups in flight for each group that is still wanted; at least 1.
        max_unread: groups of any kind that :meth:`take` has not returned, at which nothing more is drawn; None: no limit.
            Without it a stream whose groups all fail would draw without end while the trainer is busy.
    """

    def __init__(
        self,
        client: SGLangClient,
        sampling: Sampling,
        *,
        draw: Callable[[int], Sequence[Prompt]],
        finish: Callable[[RolloutGroup], T],
        is_useful: Callable[[T], bool],
        oversample: float = 1.0,
        max_unread: int | None = None,
    ) -> None:
        self._client, self._sampling, self._draw = client, sampling, draw
        self._finish, self._is_useful, self._oversample = finish, is_useful, oversample
        self._max_unread = max_unread
        self._changed = threading.Condition()
        self._state: _State[T] = _State()
        self._postponed: deque[Prompt] = deque()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: asyncio.Event | None = None
        self._is_stopping = False

    # The trainer's side.

    @property
    def error(self) -> BaseException | None:
        """What ended the stream's thread; None while all is well."""
        return self._state.error

    def start(self) -> None:
        """Begin to collect what is wanted; nothing if it runs already."""
        if self._thread is not None:
            return
        self._is_stopping, self._state.error = False, None
        self._thread = threading.Thread(target=self._run, name="rollout-stream", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Abort what is in flight, which the next :meth:`start` draws again. Idempotent."""
        if self._thread is None:
            return
        self._is_stopping = True
        self._notify_loop()
        self._thread.join()
        self._thread = None
        self._postponed.extendleft(sorted(self._state.in_flight.values(), key=lambda prompt: -prompt.order))
        self._state.in_flight.clear()

    @property
    def is_unserved(self) -> bool:
        """No server is left to ask: nothing is drawn until :meth:`serve`."""
        return self._state.is_unserved

    def serve(self, urls: Sequence[str], versions: range) -> None:
        """As :meth:`SGLangClient.serve`, after a push."""
        with self._changed:
            self._client.serve(urls, versions)
            self._state.is_unserved = False
        self._notify_loop()

    def accept(self, versions: range) -> None:
        """As :meth:`SGLangClient.accept`, before a push."""
        self._client.accept(versions)

    def want(self, count: int) -> None:
        """How many useful groups are wanted from now on, those that :meth:`take` would return included."""
        with self._changed:
            self._state.wanted = count
        self._notify_loop()

    def wait(self, timeout_s: float, useful: int = 1, resolved: int = 2**31) -> None:
        """Wait until ``useful`` groups that count, or ``resolved`` groups of any kind, are done and not taken.

        It also ends when no server is left, and after ``timeout_s``.

        Raises:
            ServerDiedError, ValueError: as :func:`megatron_dypo.rollout.collect.collect`.
        """
        with self._changed:
            state = self._state
            self._changed.wait_for(
                lambda: (
                    state.useful >= useful or state.unread >= resolved or state.is_unserved or state.error is not None
                ),
                timeout_s,
            )
            if state.error is not None:
                raise state.error

    def take(self) -> tuple[list[T], StreamCounts]:
        """What is done, in the order of the draws, and what happened meanwhile."""
        with self._changed:
            state = self._state
            done, state.done = sorted(state.done, key=lambda pair: pair[0]), []
            state.wanted, state.useful = max(0, state.wanted - state.useful), 0
            counts, state.counts = state.counts, StreamCounts()
        return [finished for _, finished in done], counts

    def still(self) -> contextlib.AbstractContextManager[object]:
        """Nothing is drawn, and no group ends, within the block."""
        return self._changed

    def unfinished(self) -> list[int]:
        """Orders that were drawn and of which :meth:`take` has not said what became, ascending: what a checkpoint needs."""
        with self._changed:
            state = self._state
            done = [order for order, _ in state.done] + [dropped.prompt.order for dropped in state.counts.dropped]
            return sorted([*state.in_flight, *done, *(prompt.order for prompt in self._postponed)])

    def postpone(self, prompts: Sequence[Prompt]) -> None:
        """Draw these before any other (a resumed run's unfinished ones). Only while the stream does not run."""
        assert self._thread is None, "the stream runs"
        self._postponed.extend(prompts)

    # The stream's thread.

    def _notify_loop(self) -> None:
        loop, wake = self._loop, self._wake
        if loop is not None and wake is not None and not loop.is_closed():
            with contextlib.suppress(RuntimeError):  # it closes just now
                loop.call_soon_threadsafe(wake.set)

    def _run(self) -> None:
        try:
            asyncio.run(self._collect())
        except BaseException as error:  # noqa: BLE001  handed to the trainer's thread, which raises it
            with self._changed:
                self._state.error = error
                self._changed.notify_all()

    async def _collect(self) -> None:
        self._loop, self._wake = asyncio.get_running_loop(), asyncio.Event()
        tasks: set[asyncio.Task[None]] = set()
        counted = ClientCounts()
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="grading") as worker:
            async with self._client:
                watch = asyncio.create_task(self._client.watch())
                try:
                    while not self._is_stopping:
                        self._wake.clear()
                        tasks |= {asyncio.create_task(self._group(prompt, worker)) for prompt in self._next_prompts()}
                        await _first([*tasks, watch], self._wake.wait())
                        for ended in [task for task in (*tasks, watch) if task.done()]:
                            ended.result()  # raises what it raised
                            tasks.discard(ended)
                        with self._changed:
                            now = self._client.counts()
                            self._state.counts.client += now.since(counted)
                            counted = now
                finally:
                    for task in (*tasks, watch):
                        task.cancel()
                    await asyncio.gather(*tasks, watch, return_exceptions=True)

    def _next_prompts(self) -> list[Prompt]:
        with self._changed:
            state = self._state
            room = math.ceil(self._oversample * (state.wanted - state.useful)) - len(state.in_flight)
            if self._max_unread is not None:
                room = min(room, self._max_unread - state.unread - len(state.in_flight))
            room = 0 if state.is_unserved else max(room, 0)
            prompts = [self._postponed.popleft() for _ in range(min(room, len(self._postponed)))]
            if room > len(prompts):
                prompts += self._draw(room - len(prompts))
            state.in_flight |= {prompt.order: prompt for prompt in prompts}
        return prompts

    async def _group(self, prompt: Prompt, worker: ThreadPoolExecutor) -> None:
        finished: T | None = None
        dropped: DroppedGroup | None = None
        try:
            rollouts = await self._client.generate(prompt.tokens, self._sampling)
            group = RolloutGroup(prompt=prompt, rollouts=rollouts)
            finished = await asyncio.get_running_loop().run_in_executor(worker, self._finish, group)
        except GroupDroppedError as error:
            warn_often(_log, "dropped the group of prompt %s: %s", prompt.prompt_id, error)
            dropped = DroppedGroup(prompt=prompt, reason=error.reason, message=str(error))
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
            self._postponed.append(self._state.in_flight.pop(prompt.order))
            self._changed.notify_all()


async def _first(tasks: Sequence[asyncio.Task[None]], event: Coroutine[Any, Any, object]) -> None:
    """Until one of the tasks, or the event, is done."""
    waiter = asyncio.ensure_future(event)
    try:
        await asyncio.wait([*tasks, waiter], return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiter.cancel()
