"""Ask all teachers at once. Each prompt is asked until enough responses are right; every response is recorded."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Coroutine, Iterator, Mapping
from typing import Any

import numpy as np

from megatron_dypo.data.rows import PromptRow
from megatron_dypo.eval.endpoints import OpenAIEndpoint
from megatron_dypo.eval.prompts import EvalPrompt, plain_text, response_seed
from megatron_dypo.eval.replies import Reply
from megatron_dypo.grading.verify import Verifier
from megatron_dypo.metrics.logs import warn_often
from megatron_dypo.metrics.progress import Progress
from megatron_dypo.rollout.attempts import GroupDroppedError
from megatron_dypo.rollout.balance import NoServerError
from megatron_dypo.traces.client import TeacherFailedError
from megatron_dypo.traces.judging import Judge
from megatron_dypo.traces.ledger import Ledger
from megatron_dypo.traces.tasks import Tasks, task_key
from megatron_dypo.types import DropReason

_MAX_FAILURES = 16
"""A teacher is given up after this many responses in a row for which every attempt failed."""
_STOP = (signal.SIGINT, signal.SIGTERM)

_log = logging.getLogger("megatron_dypo")


class Stopped(Exception):  # noqa: N818 (the user asked for it)
    """The end of the program on request. Every response that came is recorded."""


def ask_teachers(
    tasks: Tasks,
    ledgers: Mapping[str, Ledger],
    endpoints: Mapping[str, OpenAIEndpoint],
    verifier: Verifier,
    *,
    seed: int,
    bar: Progress,
) -> dict[str, str]:
    """Ask each teacher of ``endpoints`` about every task that its ledger has open.

    If a teacher fails, only its own work ends.

    Returns:
        Teacher → why it was given up, for the teachers that were.

    Raises:
        Stopped: SIGINT or SIGTERM came.
    """

    async def run() -> dict[str, str]:
        judge = Judge(verifier)
        teachers = [_Teacher(tasks, ledgers[name], one, judge, seed, bar) for name, one in endpoints.items()]
        with_failures = await _with_judge(judge, teachers)
        return {name: why for name, why in zip(endpoints, with_failures, strict=True) if why is not None}

    try:
        return asyncio.run(_until_stopped(run()))
    except asyncio.CancelledError as error:
        raise Stopped from error


async def _until_stopped(work: Coroutine[Any, Any, dict[str, str]]) -> dict[str, str]:
    """Run ``work``, and cancel it at a signal to stop; it then records every response that came."""
    task = asyncio.ensure_future(work)
    if threading.current_thread() is threading.main_thread():
        for number in _STOP:
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    return await task


async def _with_judge(judge: Judge, teachers: list[_Teacher]) -> list[str | None]:
    judging: asyncio.Future[Any] = asyncio.ensure_future(judge.run())
    asking: asyncio.Future[list[str | None]] = asyncio.gather(*(teacher.run() for teacher in teachers))
    both: list[asyncio.Future[Any]] = [judging, asking]
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if judging.done():
            judging.result()  # raises the judge's error
        return await asking
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        judge.end()
        await judging


class _Teacher:
    """The work of asking one teacher."""

    def __init__(
        self, tasks: Tasks, ledger: Ledger, endpoint: OpenAIEndpoint, judge: Judge, seed: int, bar: Progress
    ) -> None:
        self._tasks, self._ledger, self._endpoint, self._judge = tasks, ledger, endpoint, judge
        self._seed, self._bar = seed, bar
        self._open = self._open_tasks()
        self._failures = 0

    async def run(self) -> str | None:
        """Ask about every open task; return why the teacher was given up, if it was."""
        async with self._endpoint.client:
            asking = [asyncio.ensure_future(self._work()) for _ in range(self._ledger.cfg.max_in_flight)]
            try:
                await asyncio.gather(*asking)
            except (NoServerError, TeacherFailedError) as error:
                _log.warning("teacher %s is given up: %s", self._ledger.name, error)
                return str(error)
            finally:
                for one in asking:
                    one.cancel()
                await asyncio.gather(*asking, return_exceptions=True)
        return None

    def _open_tasks(self) -> Iterator[int]:
        yield from (number for number in range(len(self._tasks)) if not self._ledger.is_done(number))

    async def _work(self) -> None:
        for task in self._open:
            row = self._tasks.row(task)
            key = task_key(row)
            while not self._ledger.is_done(task):
                prompt = self._prompt(task, row, key)
                got = await self._ask(prompt)
                if got is None:
                    break
                await self._judge.record(self._ledger, key, prompt, got)
            self._bar.update(1)

    async def _ask(self, prompt: EvalPrompt) -> Reply | str | None:
        """Return a response, the text of a final refusal, or None if every attempt failed."""
        try:
            reply = await self._endpoint.ask(prompt)
        except GroupDroppedError as error:
            warn_often(_log, "%s: no response to %s: %s", self._ledger.name, prompt.prompt_id, error)
            if error.reason is DropReason.REFUSED:
                return str(error)
            self._failures += 1
            if self._failures >= _MAX_FAILURES:
                raise TeacherFailedError(
                    f"every attempt failed for {self._failures} responses in a row, the last: {error}"
                ) from error
            return None
        self._failures = 0
        return reply

    def _prompt(self, task: int, row: PromptRow, key: bytes) -> EvalPrompt:
        sample, plain = self._ledger.next_sample(task), row.prompt
        return EvalPrompt(
            prompt_id=row.prompt_id,
            visit=sample,
            order=task,
            tokens=np.empty(0, np.int32),
            text=plain_text(plain),
            answer=row.answer,
            source=row.source,
            verifier=row.verifier,
            row=row.row,
            set_name=self._ledger.name,
            seed=response_seed(self._seed, key.hex(), sample),
            plain=plain,
        )
