"""Large answers are read in a thread, with bounded memory, and refused in the same words as small ones."""

from __future__ import annotations

import asyncio
import functools
import json
import threading
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from megatron_dypo.rollout.ask import Answer, AttemptError
from megatron_dypo.rollout.collect import collect
from megatron_dypo.rollout.reader import AnswerReader
from megatron_dypo.types import Tokens
from tests.support.fake_sglang import FakeSGLang
from tests.support.rollout.clients import make_client, make_prompts


def answer(length: int, **changes: Any) -> list[dict[str, Any]]:
    ids = [7] * length
    meta: dict[str, Any] = {
        "finish_reason": {"type": "length", "length": length},
        "output_token_logprobs": [[-0.125, token, None] for token in ids],
        "weight_version": "default",
    }
    last = {"output_ids": changes.pop("output_ids", ids), "meta_info": {**meta, **changes}}
    return [{"output_ids": ids, "meta_info": meta}, last]


def replying(payload: Any, separators: tuple[str, str], _body: dict[str, Any]) -> web.Response:
    return web.Response(text=json.dumps(payload, separators=separators))


def collected(payload: Any, separators: tuple[str, str] = (",", ":"), **fields: Any) -> Any:
    reply = functools.partial(replying, payload, separators)
    with FakeSGLang(lambda index, body: reply) as fake:
        client = make_client([fake.url], max_new_tokens=4096, retries=0, **fields)
        threads = set()

        def decode(tokens: Tokens) -> str:
            threads.add(threading.current_thread().name)
            return str(len(tokens))

        client.decode = decode
        groups, stats = collect(make_prompts(1), client, group_size=2, progress=False)
    message = stats.dropped[0].message.partition("; http")[0] if stats.dropped else ""
    return groups, message, client.counts(), threads


@pytest.mark.parametrize(("length", "is_large"), [(10, False), (4000, True)])
def test_a_large_answer_is_read_in_a_thread(length: int, is_large: bool) -> None:
    (group,), _, _, (thread,) = collected(answer(length))
    assert thread.startswith("answers") is is_large
    for rollout in group.rollouts:
        assert (rollout.tokens.dtype, rollout.logp.dtype) == (np.int32, np.float32)
        assert (rollout.tokens == 7).all()
        assert (rollout.logp == np.float32(-0.125)).all()
        assert len(rollout.tokens) == len(rollout.logp) == length


def wrong(logp: Any = -0.125, token: Any = 7, place: int = 2, of: int = 6) -> dict[str, Any]:
    """Return fields of a response with one wrong row, and the tokens that belong to it."""
    rows: list[list[Any]] = [[-0.125, 7, None] for _ in range(of)]
    rows[place] = [logp, token, None]
    return {"output_token_logprobs": rows}


ids = [7] * 6
WRONG: dict[str, dict[str, Any]] = {
    "a log-prob above 0": wrong(0.5),
    "an integer below all": wrong(-12345),
    "a huge integer": wrong(-(10**30)),
    "NaN": wrong(float("nan")),
    "lowest float": wrong(-3.4e38),
    "no log-prob": wrong(None),
    "a bool": wrong(True),
    "another token": wrong(token=8),
    "a bool as token": wrong(token=True),
    "a float as token": wrong(token=7.0),
    "rows are missing": wrong(of=5),
    "no rows": {"output_token_logprobs": []},
    "an unknown token": {"output_ids": [*ids[:-1], 100], **wrong(token=100, place=5)},
    "a huge token": {"output_ids": [*ids[:-1], 2**31], **wrong(token=2**31, place=5)},
    "a negative token": {"output_ids": [*ids[:-1], -1], **wrong(token=-1, place=5)},
    "no tokens": {"output_ids": []},
    "too many tokens": {"output_ids": [7] * 5000, **wrong(of=5000)},
    "another end": {"finish_reason": {"type": "abort", "message": "paused"}},
    "another version": {"weight_version": "failed-3"},
    "no spans": {"weight_versions": [{"version": "3", "start": 1}]},
}


@pytest.mark.parametrize("name", WRONG)
def test_an_answer_is_refused_and_counted_in_the_same_way_however_its_lists_are_read(name: str) -> None:
    payload = answer(6, **WRONG[name])
    compact = collected(payload, vocab_size=100)
    spaced = collected(payload, (", ", ": "), vocab_size=100)
    assert compact[:3] == spaced[:3]
    assert compact[0] == []
    assert compact[1] or compact[2].wrong_versions
    assert compact[2].dropped_rollouts > 0


def test_the_bytes_of_an_answer_are_freed_once_it_is_read() -> None:
    kept = list[Answer]()

    def parse(_url: str, answer: Answer) -> int:
        kept.append(answer)
        assert bytes_of(answer) == [answer.num_bytes]
        assert len(answer.payload) == 2
        assert bytes_of(answer) == [answer.num_bytes], "the parts of the body are kept beside it"
        return 7

    def bytes_of(answer: Answer) -> list[int]:
        found = [value if isinstance(value, list | tuple) else [value] for value in vars(answer).values()]
        return [size] if (size := sum(len(part) for one in found for part in one if isinstance(part, bytes))) else []

    async def run(url: str) -> int:
        async with make_client([url]) as client:
            return await client.exchange("/generate", lambda: b'{"input_ids": [1]}', max_bytes=2**30, parse=parse)

    reply = functools.partial(replying, answer(4000), (",", ":"))
    with FakeSGLang(lambda index, body: reply) as fake:
        assert asyncio.run(run(fake.url)) == 7
    assert bytes_of(kept[0]) == []


def test_the_loop_goes_on_while_an_answer_is_read() -> None:
    read = threading.Event()

    async def run() -> str:
        reader = AnswerReader()
        task = asyncio.create_task(reader.read(2**20, lambda: str(read.wait(10))))
        await asyncio.sleep(0)  # the reading begins
        read.set()
        try:
            return await task
        finally:
            reader.close()

    assert asyncio.run(run()) == "True"


async def taken(reader: AnswerReader, seen: list[str], name: str, size: int | None, until: asyncio.Event) -> None:
    async with reader.taking(size):
        seen.append(name)
        await until.wait()


def test_answers_that_are_under_way_or_wait_for_the_thread_are_of_bounded_size() -> None:
    """Answers of 1 MiB, with a limit of 2 MiB: one waits for the thread and one is under way."""
    read = threading.Event()

    async def run() -> tuple[list[str], list[str]]:
        reader, seen, end = AnswerReader(most_bytes=2**21), list[str](), asyncio.Event()
        waiting = asyncio.create_task(reader.read(2**20, lambda: read.wait(10)))
        await asyncio.sleep(0)
        tasks = [asyncio.create_task(taken(reader, seen, name, 2**20, end)) for name in "abcd"]
        tasks.append(asyncio.create_task(taken(reader, seen, "small", 1000, end)))
        await asyncio.wait(tasks, timeout=0.1)
        full = [*seen]
        tasks[1].cancel()  # b has no turn yet: c comes before d
        read.set()
        await waiting
        await asyncio.wait(tasks, timeout=0.1)
        then = [*seen]
        end.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.wait_for(taken(reader, seen, "whole", 2**21, end), 10)  # nothing is held any more
        reader.close()
        return full, then

    assert asyncio.run(run()) == (["a", "small"], ["a", "small", "c"])


@pytest.mark.parametrize("size", [2**30, None])
def test_an_answer_above_the_limit_is_taken_alone(size: int | None) -> None:
    async def run() -> list[str]:
        reader, seen, end = AnswerReader(most_bytes=2**17), list[str](), asyncio.Event()
        tasks = [asyncio.create_task(taken(reader, seen, name, size, end)) for name in "ab"]
        await asyncio.wait(tasks, timeout=0.1)
        full = [*seen]
        end.set()
        await asyncio.wait_for(asyncio.gather(*tasks), 10)
        reader.close()
        return full

    assert asyncio.run(run()) == ["a"]


def test_a_server_that_died_while_it_sent_keeps_no_other_waiting_for_good() -> None:
    async def run() -> list[str]:
        reader, seen = AnswerReader(most_bytes=2**20, stalled_s=0.05), list[str]()
        dead = asyncio.create_task(taken(reader, seen, "dead", 2**20, asyncio.Event()))
        end = asyncio.Event()
        end.set()
        others = [asyncio.create_task(taken(reader, seen, name, 2**20, end)) for name in "ab"]
        await asyncio.wait_for(asyncio.gather(*others), 10)
        dead.cancel()
        reader.close()
        return seen

    assert asyncio.run(run()) == ["dead", "a", "b"]


@pytest.mark.parametrize("turns", range(6))
def test_an_answer_that_is_cancelled_as_it_gets_its_turn_leaves_its_room(turns: int) -> None:
    async def run() -> None:
        reader, seen, end = AnswerReader(most_bytes=2**20), list[str](), asyncio.Event()
        first, second = (asyncio.create_task(taken(reader, seen, name, 2**20, end)) for name in "ab")
        await asyncio.sleep(0)
        end.set()
        await first
        for _ in range(turns):
            await asyncio.sleep(0)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        await asyncio.wait_for(taken(reader, seen, "c", 2**20, end), 10)
        await asyncio.wait_for(taken(reader, seen, "d", 2**20, end), 10)
        reader.close()

    asyncio.run(run())


def test_an_error_of_the_thread_is_raised_where_the_answer_is_awaited() -> None:
    def fail() -> None:
        raise AttemptError("no")

    async def run() -> None:
        reader = AnswerReader(most_bytes=1)
        with pytest.raises(AttemptError, match="no"):
            await reader.read(2**20, fail)
        async with reader.taking(2**20):
            pass
        reader.close()

    asyncio.run(run())
