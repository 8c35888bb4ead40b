"""Judge teachers' responses as they come, many at a time, and record each with its verdict."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from megatron_dypo.eval.prompts import EvalPrompt
from megatron_dypo.eval.replies import Reply
from megatron_dypo.grading.pairs import pair_of
from megatron_dypo.grading.verify import Verifier
from megatron_dypo.traces.ledger import Ledger, TraceRecord

_MAX_BATCH = 512
"""Responses that are judged together."""


@dataclass(frozen=True, kw_only=True)
class _Came:
    ledger: Ledger
    key: str
    prompt: EvalPrompt
    reply: Reply | None
    """None: the endpoint refused the prompt for good, for the reason ``refusal``."""
    refusal: str | None
    recorded: asyncio.Future[None]


class Judge:
    """The judge of all teachers' responses. ``run`` judges and records, while other tasks call ``record``."""

    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier
        self._queue: asyncio.Queue[_Came | None] = asyncio.Queue()

    async def record(self, ledger: Ledger, key: bytes, prompt: EvalPrompt, got: Reply | str) -> None:
        """Hand a response (or a refusal, as text) to ``run``; return once it is judged and on disk."""
        recorded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        reply, refusal = (None, got) if isinstance(got, str) else (got, None)
        came = _Came(ledger=ledger, key=key.hex(), prompt=prompt, reply=reply, refusal=refusal, recorded=recorded)
        self._queue.put_nowait(came)
        await recorded

    def end(self) -> None:
        """Make ``run`` return once everything that came is recorded."""
        self._queue.put_nowait(None)

    async def run(self) -> None:
        """Judge and record until :meth:`end` is called."""
        is_open = True
        while is_open:
            batch = [await self._queue.get()]
            while len(batch) < _MAX_BATCH and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            is_open = None not in batch
            came = [one for one in batch if one is not None]
            await asyncio.to_thread(self._write, came)
            for one in came:
                if not one.recorded.done():  # a waiting task may have been cancelled
                    one.recorded.set_result(None)

    def _write(self, came: list[_Came]) -> None:
        judged = [one for one in came if one.reply is not None and not one.reply.truncated]
        pairs = [pair_of(one.prompt, one.reply.text) for one in judged if one.reply is not None]
        verdicts = {id(one): verdict for one, verdict in zip(judged, self._verifier.verify(pairs), strict=True)}
        by_ledger: dict[Ledger, list[TraceRecord]] = {}
        for one in came:
            verdict = verdicts.get(id(one))
            correct, error = False, one.refusal
            if verdict is not None:
                correct, error = verdict.is_correct, verdict.error
            by_ledger.setdefault(one.ledger, []).append(_record(one, correct, error))
        for ledger, records in by_ledger.items():
            ledger.append(records)


def _record(one: _Came, correct: bool, error: str | None) -> TraceRecord:
    reply = one.reply or Reply(text="", num_tokens=0, truncated=False)
    return TraceRecord(
        key=one.key,
        id=one.prompt.prompt_id,
        sample=one.prompt.visit,
        correct=None if error is not None else correct,
        truncated=reply.truncated,
        refused=one.reply is None,
        num_tokens=reply.num_tokens,
        num_prompt_tokens=reply.num_prompt_tokens,
        response=reply.text,
        error=error,
    )
