"""Answers of a teacher's servers, for a plan of :class:`tests.support.fake_sglang.FakeSGLang`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aiohttp import web

from tests.support.fake_sglang import Reply


def logp_of(token: int) -> float:
    """Return the log-prob that the fake teacher gives a token at any place."""
    return -0.25 - token / 64


def sglang_payload(body: dict[str, Any]) -> dict[str, Any]:
    """Make the answer of SGLang's ``/generate`` that samples nothing. Its first row has no log-prob."""
    start = body["logprob_start_len"]
    rows: list[list[Any]] = [[logp_of(token), token, None] for token in body["input_ids"][start:]]
    rows[0][0] = None
    return {"text": "", "output_ids": [], "meta_info": {"input_token_logprobs": rows, "output_token_logprobs": []}}


def openai_payload(body: dict[str, Any], *, names_ids: bool = True, samples: bool = True) -> dict[str, Any]:
    """Make the answer of ``/v1/completions`` with ``echo``; with one sampled token if ``samples``."""
    tokens = [*body["prompt"], *([9] if samples else [])]
    values: list[float | None] = [logp_of(token) for token in tokens]
    values[0] = None
    names = [f"token_id:{token}" if names_ids else f"word{token}" for token in tokens]
    return {"choices": [{"text": "", "logprobs": {"tokens": names, "token_logprobs": values, "top_logprobs": []}}]}


class Codes:
    """A tokenizer with a token for each character: its code modulo the size of the vocabulary."""

    def __init__(self, vocab_size: int = 128) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        return [ord(character) % self.vocab_size for character in text]

    def show(self, ids: Sequence[int]) -> str:
        return "".join(f"<{token}>" if token < self.vocab_size else "" for token in ids)


def answer(body: dict[str, Any], tokenizer: Codes | None = None) -> Reply:
    """Give a sound answer to any request that a run sends to a teacher."""
    own = tokenizer or Codes()
    if "input_ids" in body:
        payload = sglang_payload(body)
    elif "echo" in body:
        payload = openai_payload(body)
    elif "tokens" in body:
        payload = {"text": own.show(body["tokens"])}
    else:
        payload = {"tokens": own.encode(body["prompt"])}
    return lambda _: web.json_response(payload)
