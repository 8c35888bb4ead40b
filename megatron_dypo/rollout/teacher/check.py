"""Checks of a teacher's servers before any rollout: they answer and have the policy's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, Protocol

from megatron_dypo.config.distillation.teacher_servers import TeacherServersConfig
from megatron_dypo.rollout.responses import quote
from megatron_dypo.rollout.server.probe import request_json, require_answer, served_models

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


def require_same_tokenizer(
    cfg: TeacherServersConfig, api_key: str | None, tokenizer: Tokenizer, *, policy: str
) -> None:
    """Require each server to turn a text into the policy's token ids, and the policy's last token into its text.

    A teacher whose vocabulary is smaller than the policy's does not know the last token.

    Args:
        policy: folder of the policy's tokenizer, for messages.

    Raises:
        ValueError: ids or texts differ, or a server does not answer or refuses the key. The message names the server;
            of two tokenizers it names both.
    """
    for url in cfg.urls:
        if difference := _difference(cfg, url, api_key, tokenizer):
            names = served_models(f"{url}/v1", api_key)[1][:10]
            teacher = f"teacher_servers.urls={url!r}" + (f", which serves {', '.join(names)}" if names else "")
            raise ValueError(
                f"{teacher}: the teacher must have the policy's tokenizer, that of model.hf_path={policy}: {difference}"
            )


def name_of_model(cfg: TeacherServersConfig, api_key: str | None) -> str | None:
    """Return the name of the teacher's model, without folders before it; None if its servers tell no name.

    It is ``teacher_servers.model``, else all names that the servers tell.
    """
    told = (name for url in cfg.urls for name in served_models(f"{url}/v1", api_key)[1])
    names = {PurePath(name).name for name in ([cfg.model] if cfg.model else told)}
    return ", ".join(sorted(names)) or None


def _difference(cfg: TeacherServersConfig, url: str, api_key: str | None, tokenizer: Tokenizer) -> str | None:
    """Say in which way a server's tokenizer differs from the policy's; None: in no way that shows."""
    expected, last = tokenizer.encode(PROBE_TEXT), tokenizer.vocab_size - 1
    ids = _ask(cfg, f"{url}/tokenize", {"prompt": PROBE_TEXT, "add_special_tokens": False}, api_key).get("tokens")
    if ids != expected:
        return f"{PROBE_TEXT[:20]!r}… has ids {quote(ids)} there and {quote(expected)} here"
    answer = _ask(cfg, f"{url}/detokenize", {"tokens": [last], "skip_special_tokens": False}, api_key)
    text, own = answer.get("text", answer.get("prompt")), tokenizer.show([last])  # SGLang's name, and vLLM's
    return None if text == own else f"the policy's last token, {last}, is {quote(text)} there and {own!r} here"


def _ask(cfg: TeacherServersConfig, url: str, about: dict[str, Any], api_key: str | None) -> dict[str, Any]:
    body = about if cfg.model is None else {"model": cfg.model, **about}
    status, payload = request_json("POST", url, api_key, body, timeout_s=_TIMEOUT_S)
    require_answer(f"teacher_servers.urls: {url}", status, cfg.api_key_env)
    if not isinstance(payload, dict):
        raise ValueError(
            f"teacher_servers.urls: {url} does not answer as SGLang and vLLM do: HTTP {status}, and no JSON object"
        )
    return payload
