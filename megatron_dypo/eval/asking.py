"""Requests for many responses at once. Each response is judged and recorded soon after it comes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any

from megatron_dypo.ending import Cause
from megatron_dypo.eval.endpoints import Endpoint
from megatron_dypo.eval.prompts import EvalPrompt
from megatron_dypo.eval.replies import Reply
from megatron_dypo.metrics.logs import warn_often
from megatron_dypo.metrics.progress import Progress
from megatron_dypo.rollout.attempts import GroupDroppedError
from megatron_dypo.types import DropReason

Replies = Sequence[tuple[EvalPrompt, Reply]]

_MAX_FAILURES = 16
"""Number of responses in a row for which every attempt may fail before the endpoint is given up."""
_MAX_BATCH = 512
"""Responses that are judged together."""

_log = logging.getLogger("megatron_dypo")


class EndpointFailedError(Exception):
    """The endpoint gives no usable response."""

    cause = Cause.SERVERS_GONE


def ask_all(
    prompts: Iterable[EvalPrompt],
    endpoint: Endpoint,
    *,
    in_flight: int,
    record: Callable[[Replies], None],
    bar: Progress,
    watch: Callable[[], Coroutine[Any, Any, None]],
) -> None:
    """Ask for a response to each prompt, ``in_flight`` at once; pass responses to ``record`` soon after they come.

    A response that does not come is counted as lost and logged. Even if the function ends with an error, all responses
    that came before are recorded.

    Args:
        prompts: drawn when a place becomes free.
        record: called with some responses at a time, in a thread, but never by two threads at once.
        watch: runs while there are requests; it raises when the servers are lost for good.

    Raises:
        NoServerError: every server is gone.
        EndpointFailedError: every attempt failed for several responses in a row.
    """
    asyncio.run(_Asking(iter(prompts), endpoint, record, bar).run(in_flight, watch))


class _Asking:
    def __init__(
        self, prompts: Iterator[EvalPrompt], endpoint: Endpoint, record: Callable[[Replies], None], bar: Progress
    ) -> None:
        self._prompts, self._endpoint, self._record, self._bar = prompts, endpoint, record, bar
        self._came: asyncio.Queue[tuple[EvalPrompt, Reply] | None] = asyncio.Queue()
        self._failures = 0

    async def run(self, in_flight: int, watch: Callable[[], Coroutine[Any, Any, None]]) -> None:
        async with self._endpoint.client:
            asking: asyncio.Future[Any] = asyncio.gather(*(self._ask() for _ in range(in_flight)))
            watching: asyncio.Future[Any] = asyncio.ensure_future(watch())
            recording: asyncio.Future[Any] = asyncio.ensure_future(self._record_all())
            try:
                await asyncio.wait([asking, watching, recording], return_when=asyncio.FIRST_COMPLETED)
                for task in (watching, recording, asking):
                    if task.done():
                        task.result()  # raises its error
            finally:
                asking.cancel()
                watching.cancel()
                await asyncio.gather(asking, watching, return_exceptions=True)
                self._came.put_nowait(None)
                await recording

    async def _ask(self) -> None:
        for prompt in self._prompts:
            try:
                reply = await self._endpoint.ask(prompt)
            except GroupDroppedError as error:
                warn_often(_log, "lost response %d to %s: %s", prompt.visit, prompt.prompt_id, error)
                self._bar.update(1)
                self._failures += error.reason is not DropReason.REFUSED
                if self._failures >= _MAX_FAILURES:
                    raise EndpointFailedError(
                        f"every attempt failed for {self._failures} responses in a row, the last: {error}"
                    ) from error
            else:
                self._failures = 0
                self._came.put_nowait((prompt, reply))

    async def _record_all(self) -> None:
        """Record what comes, as much at a time as there is, until None comes."""
        is_open = True
        while is_open:
            batch = [await self._came.get()]
            while len(batch) < _MAX_BATCH and not self._came.empty():
                batch.append(self._came.get_nowait())
            is_open = batch[-1] is not None
            replies = [one for one in batch if one is not None]
            if replies:
                await asyncio.to_thread(self._record, replies)
                self._bar.update(len(replies))
