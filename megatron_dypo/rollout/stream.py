"""Collection in the background: groups are sampled and finished in a thread while the trainer does something else.

The trainer says how many useful groups it still wants; the stream keeps that many (times ``oversample``) in flight, and
no more: the number of groups sampled ahead is bounded, and so is their age. No draw is lost: a prompt whose group was
not done when the stream stopped is the first to be sampled by the next one.

Three kinds of threads share the stream's state, and its lock guards it: the trainer's; the event loop's, which only
waits for answers; and two workers of the loop, one that reads and tokenises prompts and one that grades groups. Nothing
slow runs on the loop or under the lock.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Sequence
from typing import Generic, TypeVar

from megatron_dypo.processes.stop_requests import StopFlag
from megatron_dypo.rollout.client import SGLangClient
from megatron_dypo.rollout.sampling import Sampling
from megatron_dypo.rollout.stream_sampler import StreamSampler, StreamWork
from megatron_dypo.rollout.stream_state import StreamCounts, StreamState
from megatron_dypo.types import Prompt

T = TypeVar("T")

_log = logging.getLogger(__name__)


class RolloutStream(Generic[T]):
    """Groups of rollouts, sampled and finished in a thread of its own from :meth:`start` to :meth:`stop`.

    Args:
        client: the stream's thread alone sends requests with it.
        sampling: of every group.
        work: where prompts come from, and what becomes of their groups.
        oversample: groups in flight for each group that is still wanted; at least 1.
        max_unread: draws of any outcome that :meth:`take` has not returned, at which nothing more is drawn; None: no
            limit. Without it a stream whose groups all fail would draw indefinitely while the trainer is busy.
        stop: ends every :meth:`wait` once it is set.
    """

    def __init__(
        self,
        client: SGLangClient,
        sampling: Sampling,
        work: StreamWork[T],
        *,
        oversample: float = 1.0,
        max_unread: int | None = None,
        stop: StopFlag | None = None,
    ) -> None:
        self._client, self._stop = client, stop
        self._changed = threading.Condition()
        self._state: StreamState[T] = StreamState()
        self._sampler = StreamSampler(
            client,
            sampling,
            work,
            changed=self._changed,
            state=self._state,
            oversample=oversample,
            max_unread=max_unread,
        )
        self._thread: threading.Thread | None = None

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
        self._thread = threading.Thread(target=self._sampler.run, name="rollout-stream", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Abort what is in flight; the next :meth:`start` samples it again. Idempotent."""
        if self._thread is None:
            return
        with self._changed:
            self._state.is_stopping = True
        self._sampler.wake()
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
        self._sampler.wake()

    def accept(self, versions: range) -> None:
        """Accept groups of ``versions``, as :meth:`SGLangClient.accept`; call it before a refit."""
        self._client.accept(versions)

    def want(self, count: int) -> None:
        """Say how many useful groups are wanted from now on, those that :meth:`take` would return included."""
        with self._changed:
            self._state.wanted = count
        self._sampler.wake()

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
