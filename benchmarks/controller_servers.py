"""Stub servers of ``controller.py``: each answers ``/generate`` with a whole group, as SGLang writes it.

    python benchmarks/controller_servers.py --servers 16 --k 8 --tokens 8192 --hold 64 --gap_ms 8000

The first line of the output has the URLs. A server holds requests until ``--hold`` of them are open, then it answers
them and all later ones one after the other, with ``--gap_ms`` in between. The process ends with its standard input.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import random
import sys

import numpy as np

from megatron_dypo.rollout.routes import RouteShape

_PART_BYTES = 2**18
STOP = 2
PROMPT_TOKENS = 201
ROUTES = RouteShape(num_layers=48, per_token=8, num_experts=128)
"""The sizes of Qwen3-30B-A3B."""


def make_answer(k: int, tokens: int, seed: int, *, routes: bool = False) -> bytes:
    """Return the answer of a request for ``k`` rollouts of ``tokens`` tokens, as SGLang's JSON.

    With ``routes`` each rollout has the experts of all tokens but the last, prompt included, as base64 of int32.
    """
    rng = np.random.default_rng(seed)
    size = (PROMPT_TOKENS + tokens - 1, ROUTES.num_layers, ROUTES.per_token) if routes else (0,)
    experts = base64.b64encode(rng.integers(0, ROUTES.num_experts, size).astype("<i4").tobytes()).decode()
    outputs = []
    for index in range(k):
        ids = [*rng.integers(3, 18_000, tokens - 1).tolist(), STOP]
        logp = (-rng.exponential(size=tokens)).astype(np.float32).tolist()
        meta = {
            "id": f"{seed:032x}",
            "finish_reason": {"type": "stop", "matched": STOP},
            "prompt_tokens": PROMPT_TOKENS,
            "weight_version": "3",
            "num_retractions": 0,
            "output_token_logprobs": [[one, token, None] for one, token in zip(logp, ids, strict=True)],
            "completion_tokens": tokens,
            "cached_tokens": 0,
            "e2e_latency": 61.5,
            **({"routed_experts": experts} if routes else {}),
        }
        outputs.append({"text": "word " * tokens, "output_ids": ids, "meta_info": meta, "index": index})
    return json.dumps(outputs, separators=(",", ":")).encode()


class Stub:
    """One server. It sends one answer at a time, like a server whose network is busy."""

    def __init__(self, answer: bytes, hold: int, gap_s: float) -> None:
        self._head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(answer)
        self._answer, self._hold, self._gap_s = memoryview(answer), hold, gap_s
        self._open = self._connections = 0
        self._may_begin = asyncio.Event()
        self._sending = asyncio.Semaphore(1)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        self._connections += 1
        try:
            await self._serve(reader, writer)
        finally:
            self._connections -= 1
            if not self._connections:  # the next leader comes
                self._may_begin.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError), contextlib.closing(writer):
            while True:
                await self._take(reader)
                self._open += 1
                try:
                    if self._open >= self._hold:
                        self._may_begin.set()
                    await self._may_begin.wait()
                    async with self._sending:
                        if reader.at_eof():  # the leader has ended
                            return
                        await asyncio.sleep(self._gap_s * random.uniform(0.5, 1.5))
                        await self._send(writer)
                finally:
                    self._open -= 1

    async def _take(self, reader: asyncio.StreamReader) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = head.partition(b"content-length:")[2].partition(b"\r\n")[0]
        await reader.readexactly(int(length))

    async def _send(self, writer: asyncio.StreamWriter) -> None:
        writer.write(self._head)
        for start in range(0, len(self._answer), _PART_BYTES):
            writer.write(self._answer[start : start + _PART_BYTES])
            await writer.drain()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("servers", "k", "tokens", "hold", "gap_ms", "seed", "routes"):
        parser.add_argument(f"--{name}", type=int, default=0)
    options = parser.parse_args()
    answer = make_answer(options.k, options.tokens, options.seed, routes=bool(options.routes))
    urls = []
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(options.servers):
            stub = Stub(answer, options.hold, options.gap_ms / 1e3)
            server = await asyncio.start_server(stub.serve, "127.0.0.1", 0, backlog=4096)
            await stack.enter_async_context(server)
            urls.append(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        print(json.dumps(urls), flush=True)
        await asyncio.to_thread(sys.stdin.read)
        os._exit(0)  # without a word about thousands of open connections


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
