"""One leader of ``controller.py``, in a process of its own. Its last line is a JSON object."""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import statistics
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import measure
import numpy as np
from controller_servers import PROMPT_TOKENS, ROUTES, STOP
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_dypo.batching.pack import pack
from megatron_dypo.config.rollout import RolloutConfig
from megatron_dypo.processes.garbage import only_short_collections
from megatron_dypo.rollout import responses
from megatron_dypo.rollout.ask import Answer
from megatron_dypo.rollout.client import SGLangClient
from megatron_dypo.rollout.descriptors import raise_descriptor_limit
from megatron_dypo.rollout.reader import AnswerReader
from megatron_dypo.rollout.routes import RouteShape
from megatron_dypo.rollout.sampling import Sampling
from megatron_dypo.types import Rollout, Routes, Sample, SampleKind, Tokens, Treatment

T = TypeVar("T")

PROMPT = np.arange(PROMPT_TOKENS - 1, dtype=np.int32)
EVERY_S = 0.005
"""Seconds between two looks at the lag of the event loop."""


class _InLoop(AnswerReader):
    async def read(self, num_bytes: int, read: Callable[[], T]) -> T:
        return read()


def read_routes_at_once(encoded: list[Any], num_tokens: list[int], shape: RouteShape) -> list[Routes]:
    """Decode whole texts, and check the experts."""
    found = []
    for text, count in zip(encoded, num_tokens, strict=True):
        experts = np.frombuffer(base64.b64decode(text, validate=True), "<i4")
        assert 0 <= int(experts.min()) <= int(experts.max()) < shape.num_experts
        found.append(experts.reshape(count - 1, shape.num_layers, shape.per_token).astype(shape.dtype))
    return found


class ListsClient(SGLangClient):
    """The named alternative: ``json.loads``, a Python object and a check for each number, and one decoding for the
    routes of a rollout, all in the event loop."""

    async def __aenter__(self) -> ListsClient:
        await super().__aenter__()
        self._reader = _InLoop()
        responses.read_routes = read_routes_at_once  # type: ignore[attr-defined, assignment]
        return self

    def _parse(self, sampling: Sampling, num_prompt_tokens: int, url: str, answer: Answer) -> tuple[Rollout, ...]:
        return self._rollouts(answer.payload, sampling, num_prompt_tokens)


CLIENTS = {"lists": ListsClient, "columns": SGLangClient}


class Steps:
    """The processor time of the longest step of the event loop: one callback, or one task up to its next wait."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._run = asyncio.Handle._run

    def __enter__(self) -> Steps:
        def run(handle: asyncio.Handle) -> None:
            start = time.thread_time()
            self._run(handle)
            self.longest_s = max(self.longest_s, time.thread_time() - start)

        asyncio.Handle._run = run  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        asyncio.Handle._run = self._run  # type: ignore[method-assign]


async def watch_lag(lags: list[float]) -> None:
    while True:
        start = time.perf_counter()
        await asyncio.sleep(EVERY_S)
        lags.append(time.perf_counter() - start - EVERY_S)


def packed(rollouts: list[Rollout], order: int) -> None:
    """Pack each rollout into a microbatch of its own, and drop it."""
    for member in range(len(rollouts)):
        rollout = rollouts.pop()
        sample = Sample(
            order=order,
            member=member,
            treatment=Treatment.REINFORCE,
            kind=SampleKind.ROLLOUT,
            tokens=np.concatenate([PROMPT, [order], rollout.tokens]).astype(np.int32),
            num_prompt_tokens=PROMPT_TOKENS,
            policy_version=rollout.policy_version,
            rollout_logp=rollout.logp,
            routes=rollout.routes,
        )
        pack([sample], [0], len(sample.tokens), streams=())


def text_of(is_decoded: bool) -> Callable[[Tokens], str]:
    """Return the way from tokens to text: a tokenizer of bytes and their pairs, or no text at all."""
    if not is_decoded:
        return lambda tokens: ""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in letters for b in letters[:70]]
    vocabulary = {text: number for number, text in enumerate([*letters, *(a + b for a, b in pairs)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.decoder = decoders.ByteLevel()
    return lambda tokens: tokenizer.decode(tokens.tolist())


async def lead(client: SGLangClient, prompts: int, answers: int, sampling: Sampling) -> dict[str, Any]:
    """Ask for ``prompts`` groups at once; end when ``answers`` of them are packed."""
    lags: list[float] = []
    groups = 0
    is_over = asyncio.Event()

    async def one(order: int) -> None:
        nonlocal groups
        rollouts = list(await client.generate(np.append(PROMPT, order).astype(np.int32), sampling))
        await asyncio.to_thread(packed, rollouts, order)  # the trainer's thread packs them
        groups += 1
        if groups >= answers:
            is_over.set()

    async with client:
        with Steps() as steps:
            lag = asyncio.create_task(watch_lag(lags))
            start, start_cpu = time.perf_counter(), time.process_time()
            tasks = []
            for order in range(prompts):  # as collect() does
                tasks.append(asyncio.create_task(one(order)))
                if order % 64 == 63:
                    await asyncio.sleep(0)
            await is_over.wait()
            seconds, cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
        await asyncio.sleep(0)  # the end of thousands of open requests is no step that is measured
        for task in (*tasks, lag):
            task.cancel()
        await asyncio.gather(*tasks, lag, return_exceptions=True)
    return {
        "groups_per_s": groups / seconds,
        "cpu_ms": 1e3 * cpu_s / (groups * sampling.n),
        "lag_p50_ms": 1e3 * statistics.median(lags),
        "lag_p99_ms": 1e3 * float(np.quantile(lags, 0.99)),
        "lag_max_ms": 1e3 * max(lags),
        "step_ms": 1e3 * steps.longest_s,
        "peak_mib": measure.peak_bytes() / 2**20,
    }


async def idle() -> dict[str, Any]:
    """Measure the lag of an event loop without work, until the input ends: the share that the machine's load has."""
    lags: list[float] = []
    lag = asyncio.create_task(watch_lag(lags))
    await asyncio.to_thread(sys.stdin.read)
    lag.cancel()
    return {"lag_p99_ms": 1e3 * float(np.quantile(lags, 0.99)) if lags else 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--client", choices=[*CLIENTS, "idle"], required=True)
    parser.add_argument("--urls", help="JSON list")
    parser.add_argument("--text", action="store_true", help="decode the text of each rollout")
    parser.add_argument("--routes", action="store_true", help="ask for the routes of each rollout")
    for name in ("prompts", "answers", "k", "tokens"):
        parser.add_argument(f"--{name}", type=int)
    options = parser.parse_args()
    found = asyncio.run(idle()) if options.client == "idle" else measured(options)
    print(json.dumps({name: round(value, 3) for name, value in found.items()}))


def measured(options: argparse.Namespace) -> dict[str, Any]:
    raise_descriptor_limit()
    client = CLIENTS[options.client](
        json.loads(options.urls),
        None,
        cfg=RolloutConfig(max_new_tokens=options.tokens, max_in_flight=options.prompts, retries=100),
        decode=text_of(options.text),
        stop_token_ids=(STOP,),
        vocab_size=20_000,
        routes=ROUTES if options.routes else None,
    )
    client.accept((3,))
    with only_short_collections():  # as collect() does
        return asyncio.run(lead(client, options.prompts, options.answers, client.sampling(options.k)))


if __name__ == "__main__":
    main()
