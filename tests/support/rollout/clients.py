"""Clients of fake servers, prompts for them, and a URL that nobody serves."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_dypo.config.rollout import RolloutConfig
from megatron_dypo.rollout.client import SGLangClient
from megatron_dypo.types import Prompt, Tokens

_TAKEN: list[socket.socket] = []
"""Sockets of closed URLs. An open one keeps its port from every other process."""


def make_prompts(count: int) -> list[Prompt]:
    """Return prompts 0 to ``count`` − 1; the last token of each is 100 more than its number."""
    return [
        Prompt(
            prompt_id=f"p{i}",
            visit=0,
            order=i,
            tokens=np.array([7, 100 + i], dtype=np.int32),
            text=f"prompt {i}",
            answer="",
            source="test",
        )
        for i in range(count)
    ]


def make_client(
    urls: Sequence[str],
    check: Callable[[], None] | None = None,
    *,
    router: str | None = None,
    api_key: str = "key",
    vocab_size: int | None = None,
    run_seed: int | None = None,
    **fields: Any,
) -> SGLangClient:
    """Return a client of these servers with short waits; ``fields`` are those of ``RolloutConfig``."""

    def decode(tokens: Tokens) -> str:
        return " ".join(map(str, tokens))

    cfg = RolloutConfig(**{"max_new_tokens": 16, "request_deadline_s": 20.0, **fields})
    return SGLangClient(
        urls,
        api_key,
        cfg=cfg,
        decode=decode,
        stop_token_ids=(2, 5),
        check=check,
        router=router,
        backoff_s=0.02,
        vocab_size=vocab_size,
        run_seed=run_seed,
    )


def closed_url() -> str:
    """Return a URL on which nobody listens, as long as this process lives."""
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
    _TAKEN.append(taken)
    return f"http://127.0.0.1:{taken.getsockname()[1]}"
