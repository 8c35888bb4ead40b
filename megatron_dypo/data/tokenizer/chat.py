"""Chat templates: a model's jinja2 program from messages to the text of a prompt, and the text around its turns."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dypo.data.tokenizer.template_process import TEMPLATES, TemplateError, TemplateRefusedError

log = logging.getLogger(__name__)

Message = Mapping[str, Any]
"""``{"role": ..., "content": ...}``; a template may read other keys too."""

_GIVEN = {"messages": "the prompt itself", "add_generation_prompt": "always true for a prompt"}
"""Names that :meth:`ChatTemplate.render` passes to a template; a user may not set them."""
_USER, _ASSISTANT = "dypo user text", "dypo assistant text"
"""Texts that no template writes itself and that ``trim`` does not change."""
_OPEN_TAG = re.compile(r"(?:<(\w+)>\s*(?:</\1>\s*)?|\[(\w+)\]\s*(?:\[/\2\]\s*)?)$")
"""A tag at the end of a text, opened, or opened and closed: ``<think>\\n``, ``[THINK]``."""


@dataclass(frozen=True, kw_only=True)
class Turns:
    """The text that a template writes around the turns of an assistant."""

    end: str = ""
    """Text after the assistant's last message (``<|im_end|>\\n``); empty if the template writes none or cannot render
    an assistant's message."""
    generation_suffix: str = ""
    """Additional end of the answer's header, compared with that of an earlier, finished answer: ``<think>\\n`` if the
    prompt opens the thinking (Qwen3-Thinking, R1-Distill), else empty. A teacher's trace may begin with it too."""


class ChatTemplate:
    """One chat template.

    ``special_tokens`` are the names a template reads besides the messages (``bos_token``, ``eos_token``, …), and
    ``arguments`` those of ``data.chat_template_args``. Raises ValueError naming ``place`` if the template is not valid
    jinja2, or if it never reads one of the arguments.
    """

    def __init__(
        self, template: str, special_tokens: Mapping[str, str], place: str, arguments: Mapping[str, Any] | None = None
    ) -> None:
        self._template, self._place = template, place
        self._values = {"tools": None, "documents": None, **special_tokens, **(arguments or {})}
        try:
            names = TEMPLATES.variables(template)
        except TemplateError as error:
            raise ValueError(f"{place}: chat_template: {error}") from error
        self._require_read(arguments or {}, names, set(special_tokens))

    def _require_read(self, arguments: Mapping[str, Any], names: frozenset[str], special_tokens: set[str]) -> None:
        for name, value in arguments.items():
            if name in _GIVEN:
                raise ValueError(f"data.chat_template_args.{name}={value!r}: is not yours to give: {_GIVEN[name]}")
            if name not in names:
                others = ", ".join(sorted(names - set(_GIVEN) - special_tokens)) or "no others"
                raise ValueError(
                    f"data.chat_template_args.{name}={value!r}: the template of {self._place} never reads it; "
                    f"besides messages and special tokens it reads {others}"
                )

    def render(self, messages: Sequence[Message], *, for_generation: bool = True) -> str:
        """Return the text of a conversation; with ``for_generation`` including the header of the assistant's next turn.

        Raises ValueError with the template's own words if it refuses the messages (for example an unknown role), and
        with the reason if it fails or takes too much time or memory.
        """
        try:
            return self._render(messages, for_generation)
        except TemplateRefusedError as error:
            raise ValueError(
                f"{self._place}: the chat template refuses messages with roles {_roles(messages)}: {error}"
            ) from error
        except TemplateError as error:
            raise ValueError(
                f"{self._place}: the chat template fails on messages with roles {_roles(messages)}: {error}"
            ) from error

    def _render(self, messages: Sequence[Message], for_generation: bool) -> str:
        given = {"messages": list(messages), "add_generation_prompt": for_generation}
        return TEMPLATES.render(self._template, {**self._values, **given})

    def turns(self) -> Turns:
        """Find out, by rendering short conversations, what the template writes around an assistant's turns.

        Raises ValueError if the template fails on a single message of a user (refusing it is allowed), or loses its
        text.
        """
        user, assistant = _message("user", _USER), _message("assistant", _ASSISTANT)
        try:
            prompt = self._render([user], True)
        except TemplateRefusedError as error:
            log.warning(
                "%s: the chat template refuses one message of a user (%s); eos_token ends turns", self._place, error
            )
            return Turns()
        except TemplateError as error:
            raise ValueError(f"{self._place}: the chat template fails on a message of a user: {error}") from error
        if _USER not in prompt:
            raise ValueError(f"{self._place}: the chat template does not write the text of a user's message")
        header = prompt.rpartition(_USER)[2]
        finished = self._probe([user, assistant], False)
        earlier = self._probe([user, assistant, user], True)
        end = finished.rpartition(_ASSISTANT)[2] if finished is not None else ""
        between = None if earlier is None else earlier.partition(_USER)[2].partition(_ASSISTANT)[0]
        # A template without roles writes the same text after each message. It is the header of an answer, not its end.
        return Turns(end="" if end == header else end, generation_suffix=_suffix(header, between))

    def _probe(self, messages: Sequence[Message], for_generation: bool) -> str | None:
        """Return the text of a conversation with an assistant's turn; None, logged once, if the template has none."""
        try:
            text = self._render(messages, for_generation)
        except TemplateError as error:
            why = str(error)
        else:
            if _ASSISTANT in text:
                return text
            why = "the text is missing"
        log.warning(
            "%s: the chat template renders no assistant's turn among roles %s (%s)%s",
            self._place,
            _roles(messages),
            why,
            "" if for_generation else ": eos_token ends turns",
        )
        return None


def _suffix(header: str, earlier: str | None) -> str:
    """Return the end of ``header`` (of the next answer) that ``earlier`` (of a finished answer) lacks, else the tag
    that the header opens."""
    tag = _OPEN_TAG.search(header)
    if earlier is not None:
        shorter = min(len(header), len(earlier))
        common = next((i for i, (a, b) in enumerate(zip(header, earlier, strict=False)) if a != b), shorter)
        # If both continue differently, they are two different headers. Only a space before a finished answer is
        # allowed.
        beyond = header[common:] if not earlier[common:].strip() else ""
        if beyond.strip():
            return beyond
    return tag.group() if tag else ""


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _roles(messages: Sequence[Message]) -> list[Any]:
    return [message.get("role") for message in messages]
