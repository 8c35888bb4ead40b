"""Wire formats of a teacher's servers: token ids out, log-probs of the response in. Every field used is checked.

Shape legend: R response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from megatron_dypo.config.distillation.teacher_servers import TeacherServersConfig
from megatron_dypo.rollout.responses import quote
from megatron_dypo.types import Floats, Tokens

_BYTES_PER_TOKEN = 512
_BYTES_PER_ANSWER = 2**20
_LOGP_RANGE = (-1e4, 1e-3)
"""Range of log-probs. A rounding error may lift one above 0. SGLang writes log 0 as the lowest float, which is
refused."""
_ID_PREFIX = "token_id:"
"""Prefix of a token id in vLLM's answers with ``return_tokens_as_token_ids``."""


class BadAnswerError(Exception):
    """An answer without a valid log-prob for each token of the response."""


class Format(Protocol):
    """The wire format of one kind of server."""

    path: str
    """URL path for requests for log-probs."""

    def request(self, prompt: Tokens, response: Tokens) -> dict[str, Any]:
        """Return the body of a request for the log-probs of ``response`` after ``prompt``."""

    def read(self, payload: Any, prompt: Tokens, response: Tokens) -> Floats:
        """Return the [R] log-probs of an answer of any type.

        Raises:
            BadAnswerError: log-probs are too few or too many, of other tokens, or not finite.
        """


class SGLangFormat:
    """SGLang's ``/generate``, which samples nothing and returns log-probs of its input at temperature 1."""

    path = "/generate"

    def __init__(self, vocab_size: int) -> None:
        self._last = vocab_size - 1

    def request(self, prompt: Tokens, response: Tokens) -> dict[str, Any]:
        return {
            "input_ids": np.concatenate([prompt, response]).tolist(),
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0, "top_p": 1.0, "top_k": -1},
            "return_logprob": True,
            # Start at the last token of the prompt (its log-prob is left out), so that the prompt stays in the cache.
            "logprob_start_len": len(prompt) - 1,
        }

    def read(self, payload: Any, prompt: Tokens, response: Tokens) -> Floats:
        meta = payload.get("meta_info") if isinstance(payload, dict) else None
        rows = meta.get("input_token_logprobs") if isinstance(meta, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) >= 2 for row in rows):
            raise BadAnswerError(f"input_token_logprobs={quote(rows)}: must be a list of rows (log-prob, token id)")
        _require_count(len(rows), len(response) + 1)
        # It writes 0 for the last id of a model's vocabulary (managers/scheduler_components/
        # logprob_result_processor.py:54 of 0.5.23), beside that token's own log-prob.
        given = [row[1] for row in rows[1:]]
        pairs = zip(given, response.tolist(), strict=True)
        _require_ids([own if one == 0 and own >= self._last else one for one, own in pairs], response)
        return _finite([row[0] for row in rows[1:]])


class OpenAIFormat:
    """``/v1/completions`` with token ids, which echoes the prompt with its log-probs and samples at most one token.

    Servers that know vLLM's ``return_tokens_as_token_ids`` say which tokens the log-probs are of, which is checked.
    """

    path = "/v1/completions"

    def __init__(self, model: str) -> None:
        self._model = model

    def request(self, prompt: Tokens, response: Tokens) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": np.concatenate([prompt, response]).tolist(),
            "max_tokens": 1,  # a server may refuse 0
            "temperature": 1.0,
            "top_p": 1.0,
            "echo": True,
            "logprobs": 1,
            "return_tokens_as_token_ids": True,
        }

    def read(self, payload: Any, prompt: Tokens, response: Tokens) -> Floats:
        choices = payload.get("choices") if isinstance(payload, dict) else None
        choice = choices[0] if isinstance(choices, list) and len(choices) == 1 else None
        logprobs = choice.get("logprobs") if isinstance(choice, dict) else None
        values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
        tokens = logprobs.get("tokens") if isinstance(logprobs, dict) else None
        if not isinstance(values, list) or not isinstance(tokens, list) or len(tokens) != len(values):
            raise BadAnswerError(f"choices={quote(choices)}: must be one, with logprobs.tokens and .token_logprobs")
        length = len(prompt) + len(response)
        if len(values) != length:  # without the token that was sampled, where the response ends the text
            _require_count(len(values), length + 1)
        named = tokens[len(prompt) : length]
        if any(isinstance(token, str) and token.startswith(_ID_PREFIX) for token in tokens):
            _require_ids([_named_id(token) for token in named], response)
        return _finite(values[len(prompt) : length])


def format_of(cfg: TeacherServersConfig, vocab_size: int) -> Format:
    """Return the format that ``cfg.api`` names; token ids of the policy are below ``vocab_size``."""
    return SGLangFormat(vocab_size) if cfg.api == "sglang" else OpenAIFormat(cfg.model or "")


def most_bytes(num_tokens: int) -> int:
    """Return the size above which an answer cannot be one about ``num_tokens`` tokens."""
    return _BYTES_PER_ANSWER + num_tokens * _BYTES_PER_TOKEN


def _named_id(token: Any) -> Any:
    text = token.removeprefix(_ID_PREFIX) if isinstance(token, str) and token.startswith(_ID_PREFIX) else ""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 11 else token


def _require_count(count: int, expected: int) -> None:
    if count != expected:
        raise BadAnswerError(f"log-probs of {count} tokens for {expected}")


def _require_ids(ids: Sequence[Any], response: Tokens) -> None:
    for place, (given, own) in enumerate(zip(ids, response.tolist(), strict=True)):
        if type(given) is not int or given != own:
            raise BadAnswerError(
                f"a log-prob of token {quote(given)} at place {place} of the response, which has {own}"
            )


def _finite(values: Sequence[Any]) -> Floats:
    low, high = _LOGP_RANGE
    for place, value in enumerate(values):
        if type(value) not in (int, float) or not low <= value <= high:  # NaN is in no range
            raise BadAnswerError(f"log-prob {quote(value)} at place {place} of the response: must be finite, at most 0")
    return np.asarray(values, dtype=np.float32)
