"""The supported APIs for responses: SGLang's own, and OpenAI's chat and completions."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any, Literal, Protocol

from megatron_dypo.config.evaluation import SetSettings
from megatron_dypo.config.rollout import RolloutConfig
from megatron_dypo.data.tokenizer.chat import Message
from megatron_dypo.eval.prompts import EvalPrompt
from megatron_dypo.eval.replies import Reply
from megatron_dypo.rollout.ask import Answer, AttemptError
from megatron_dypo.rollout.client import SGLangClient
from megatron_dypo.rollout.http_client import HttpClient

Api = Literal["sglang", "chat", "completions"]

_BYTES_PER_TOKEN = 64
_BYTES_PER_ANSWER = 2**20


class Endpoint(Protocol):
    """An API that answers prompts."""

    @property
    def client(self) -> HttpClient:
        """The client of its servers."""

    async def ask(self, prompt: EvalPrompt) -> Reply:
        """Return one response. Raises as in :meth:`megatron_dypo.rollout.http_client.HttpClient.exchange`."""


class SGLangEndpoint:
    """SGLang servers with their own API: token ids in, token ids out, as in training."""

    def __init__(self, client: SGLangClient, settings: Mapping[str, SetSettings]) -> None:
        self.client, self._settings = client, settings

    async def ask(self, prompt: EvalPrompt) -> Reply:
        """Return one response to the prompt's tokens, with its seed."""
        temperature = self._settings[prompt.set_name].temperature
        sampling = self.client.sampling(1, temperature=temperature, seed=prompt.seed)
        (rollout,) = await self.client.generate(prompt.tokens, sampling)
        return Reply(text=rollout.text, num_tokens=len(rollout.tokens), truncated=rollout.finish == "length")


class OpenAIEndpoint:
    """Servers with OpenAI's API.

    Args:
        client: of the servers.
        base: path of the API, ``/v1``.
        model: name of the model there.
        api: ``chat`` sends messages, which the server renders; ``completions`` sends token ids, or the prompt's text
            where there is no tokenizer.
        extra: more fields of each request, which win over those above.
    """

    def __init__(
        self,
        client: HttpClient,
        *,
        base: str,
        model: str,
        api: Literal["chat", "completions"],
        rollout: RolloutConfig,
        settings: Mapping[str, SetSettings],
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self._extra = dict(extra or {})
        self.client, self._base, self._model, self._api = client, base, model, api
        self._rollout, self._settings = rollout, settings

    async def ask(self, prompt: EvalPrompt) -> Reply:
        """Return one response."""
        path = f"{self._base}/chat/completions" if self._api == "chat" else f"{self._base}/completions"
        limit = _BYTES_PER_ANSWER + self._rollout.max_new_tokens * _BYTES_PER_TOKEN
        body = functools.partial(self._body, prompt)
        return await self.client.exchange(path, body, max_bytes=limit, parse=functools.partial(_read, self._api))

    def _body(self, prompt: EvalPrompt) -> bytes:
        given: dict[str, Any] = {"model": self._model, **self._prompt(prompt), "n": 1, "seed": prompt.seed}
        given |= {"temperature": self._settings[prompt.set_name].temperature, "top_p": self._rollout.top_p}
        given["max_tokens"] = self._rollout.max_new_tokens
        # Not of OpenAI's API, but of SGLang's and vLLM's: sent only where it says something.
        top_k = {} if self._rollout.top_k == -1 else {"top_k": self._rollout.top_k}
        return json.dumps({**given, **top_k, **self._extra}).encode()

    def _prompt(self, prompt: EvalPrompt) -> dict[str, Any]:
        if self._api == "chat":
            return {"messages": as_messages(prompt.plain)}
        return {"prompt": prompt.tokens.tolist() if len(prompt.tokens) else prompt.plain}


def as_messages(plain: str | list[Message]) -> list[Message]:
    """Return a prompt as messages; a text becomes one message of the user."""
    return [{"role": "user", "content": plain}] if isinstance(plain, str) else plain


def _read(api: Literal["chat", "completions"], url: str, answer: Answer) -> Reply:
    """Return the response in an answer. Raises :class:`AttemptError` if it is not a whole response."""
    problem = f"no response as OpenAI's {api} API gives it: {answer.shown}"
    payload = answer.payload
    choices = payload.get("choices") if isinstance(payload, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise AttemptError(problem)
    finish, text = choices[0].get("finish_reason"), _text(choices[0], api)
    if finish not in ("stop", "length"):
        raise AttemptError(f"a response ended with finish_reason={finish!r:.100}: {answer.shown}")
    usage = payload.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    if text is None or type(count) is not int or count < 0:
        raise AttemptError(problem)
    of_prompt = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return Reply(
        text=text,
        num_tokens=count,
        truncated=finish == "length",
        num_prompt_tokens=of_prompt if type(of_prompt) is int and of_prompt > 0 else 0,
    )


def _text(choice: dict[str, Any], api: str) -> str | None:
    """Return the text of a response, including thinking that the server returned separately."""
    if api == "completions":
        text = choice.get("text")
        return text if isinstance(text, str) else None
    message = choice.get("message")
    if not isinstance(message, dict):
        return None
    content, thinking = message.get("content"), message.get("reasoning_content")
    if isinstance(thinking, str) and thinking:
        # A response that was truncated during its thinking has no content, and its thinking has no end.
        closing = "\n</think>\n" if isinstance(content, str) and content else ""
        return f"<think>\n{thinking}{closing}{content or ''}"
    return content if isinstance(content, str) else None
