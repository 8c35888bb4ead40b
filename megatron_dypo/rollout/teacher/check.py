"""Checks of a teacher's servers before any rollout: they answer and have the policy's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from megatron_dypo.config.distillation.teacher_servers import TeacherServersConfig
from megatron_dypo.rollout.responses import quote
from megatron_dypo.rollout.server.probe import request_json

PROBE_TEXT = (
    "Let f(x) = 3x² − 12.5; so ∑ f(i) = 1,024.\n\n    def f(x):\treturn 3*x**2  # naïve\n答案是 42。 Привет! 🙂"
)
"""Scripts, digits, white space and signs for which tokenizers differ."""
_TIMEOUT_S = 60.0


class Tokenizer(Protocol):
    """The part of the policy's tokenizer that is compared."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def show(self, ids: Sequence[int]) -> str: ...


def require_same_tokenizer(cfg: TeacherServersConfig, api_key: str | None, tokenizer: Tokenizer) -> None:
    """Require each server to turn a text into the policy's token ids, and the policy's last token into its text.

    A teacher whose vocabulary is smaller than the policy's does not know the last token.

    Raises:
        ValueError: ids or texts differ, or a server does not answer; the message names the server.
    """
    expected = tokenizer.encode(PROBE_TEXT)
    last = tokenizer.vocab_size - 1
    for url in cfg.urls:
        place = f"teacher_servers.urls={url!r}"
        about = {"prompt": PROBE_TEXT, "add_special_tokens": False}
        ids = _ask(f"{url}/tokenize", {**_named(cfg), **about}, api_key, place).get("tokens")
        if ids != expected:
            raise ValueError(
                f"{place}: the teacher must have the policy's tokenizer: {PROBE_TEXT[:20]!r}… has ids "
                f"{quote(ids)} there and {expected[:20]}… here"
            )
        about = {"tokens": [last], "skip_special_tokens": False}
        answer = _ask(f"{url}/detokenize", {**_named(cfg), **about}, api_key, place)
        text = answer.get("text", answer.get("prompt"))  # SGLang's name, and vLLM's
        if text != tokenizer.show([last]):
            raise ValueError(
                f"{place}: the teacher must have the policy's tokenizer: its last token, {last}, is {quote(text)} "
                f"there and {tokenizer.show([last])!r} here"
            )


def _named(cfg: TeacherServersConfig) -> dict[str, str]:
    return {} if cfg.model is None else {"model": cfg.model}


def _ask(url: str, body: dict[str, Any], api_key: str | None, place: str) -> dict[str, Any]:
    status, payload = request_json("POST", url, api_key, body, timeout_s=_TIMEOUT_S)
    if not isinstance(payload, dict):
        said = "nothing answers" if status is None else f"HTTP {status}, and no JSON object"
        raise ValueError(f"{place}: {url} does not answer as SGLang and vLLM do: {said}")
    return payload
