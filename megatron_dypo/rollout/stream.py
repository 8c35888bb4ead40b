"""Collection in the background: groups are sampled and graded in a thread while the trainer does something else.

The trainer says how many useful groups it still wants. The stream keeps at most that many (times ``oversample``) in
flight, so the number of groups sampled ahead is bounded, and so is their age. No draw is lost: if a group was not done
when the stream stopped, its prompt is sampled first at the next start.

Three kinds of threads share the stream's state under its lock: the trainer's thread; the event loop's thread, which
only waits for answers; and two workers of the loop, one of which reads and tokenises prompts while the other grades
groups. Nothing slow runs on the loop or under the lock.

While a stream runs, Python's collector leaves old objects alone. With thousands of open requests it would stop all
threads for 0.2 s at a time. So the trainer calls ``gc.collect()`` once a step.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Sequence
from typing import Generic, TypeVar

from megatron_dypo.processes.garbage import only_short_collections
from megatron_dypo.processes.stop_requests import StopFlag
from megatron_dypo.rollout.client import SGLangClient
from megatron_dypo.rollout.sampling import Sampling
from megatron_dypo.rollout.stream_sampler import StreamSampler, StreamWork
from megatron_dypo.rollout.stream_state import StreamCounts, StreamState
from megatron_dypo.types import Prompt

T = TypeVar("T")

_log = logging.getLogger(__name__)


class RolloutStream(Generic[T]):
    """Groups of rollouts that a separate thread samples and finishes, from :meth:`start` to :meth:`stop`.

    Args:
        client: a client that only the stream's thread uses.
        sampling: sampling parameters of every group.
        work: how prompts are drawn, and how their groups are finished.
        oversample: groups in flight for each group that is still wanted; at least 1.
        max_unread: stop drawing when :meth:`take` has this many draws to return, of any outcome. None: no limit.
            Without a limit, a stream whose groups all fail would draw indefinitely while the trainer is busy.
        stop: ends every :meth:`wait` when it is set.
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
        self._until_stop = contextlib.ExitStack()

    @property
    def error(self) -> BaseException | None:
        """The error that ended the stream's thread; None while all is well."""
        with self._changed:
            return self._state.error

    @property
    def is_unserved(self) -> bool:
        """Whether no server is left. Then nothing is drawn until :meth:`use_servers`."""
        with self._changed:
            return self._state.is_unserved

    @property
    def num_in_flight(self) -> int:
        """Number of draws without an outcome."""
        with self._changed:
            return self._state.under_way

    @property
    def num_unread(self) -> int:
        """Number of draws, of any outcome, that :meth:`take` would return."""
        with self._changed:
            return self._state.unread

    def start(self) -> None:
        """Begin to collect the wanted groups. Do nothing if the stream runs already."""
        if self._thread is not None:
            return
        with self._changed:
            self._state.is_stopping, self._state.error = False, None
        self._until_stop.enter_context(only_short_collections())
        self._thread = threading.Thread(target=self._sampler.run, name="rollout-stream", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Abort the groups in flight; the next :meth:`start` samples them again. Idempotent."""
        if self._thread is None:
            return
        with self._changed:
            self._state.is_stopping = True
        self._sampler.wake()
        self._thread.join()
        self._thread = None
        self._until_stop.close()
        with self._changed:
            state = self._state
            state.postponed.extendleft(sorted(state.in_flight.values(), key=lambda prompt: -prompt.order))
            state.in_flight.clear()

    def use_servers(self, urls: Sequence[str], versions: range) -> None:
        """Send requests to ``urls`` from now on, like :meth:`SGLangClient.use_servers`. Call it after a refit."""
        with self._changed:
            self._client.use_servers(urls, versions)
            self._state.is_unserved = False
        self._sampler.wake()

    def accept(self, versions: range) -> None:
        """Accept groups of ``versions``, like :meth:`SGLangClient.accept`. Call it before a refit."""
        self._client.accept(versions)

    def want(self, count: int) -> None:
        """Set how many useful groups are wanted from now on, including those that :meth:`take` would return."""
        with self._changed:
            self._state.wanted = count
        self._sampler.wake()

    def wait(self, timeout_s: float, useful: int = 1, resolved: int = 2**31) -> None:
        """Wait until ``useful`` useful groups, or ``resolved`` draws of any outcome, can be taken.

        The wait also ends when no server is left, when ``stop`` is set, and after ``timeout_s``.

        Raises:
            ServerDiedError, ValueError: as in :func:`megatron_dypo.rollout.collect.collect`.
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
        """Hold the stream's lock: within the block nothing is drawn, and no group ends.

        The block may call :meth:`unfinished`, since the lock is reentrant.
        """
        return self._changed

    def unfinished(self) -> list[int]:
        """Return the orders of the draws that :meth:`take` has not returned, ascending. A checkpoint stores them."""
        with self._changed:
            return self._state.unfinished()

    def postpone(self, prompts: Sequence[Prompt]) -> None:
        """Sample these prompts (unfinished ones of a resumed run) before others. Call it only while the stream is
        stopped."""
        assert self._thread is None, "the stream runs"
        with self._changed:
            self._state.postponed.extend(prompts)

    def _notify_waiters(self) -> None:
        with self._changed:
            self._changed.notify_all()
