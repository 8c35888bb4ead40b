"""Chat templates: the jinja2 environment that Hugging Face templates are written for, sandboxed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]
"""``{"role": ..., "content": ...}``; a template may read other keys too."""


class _GenerationBlock(Extension):
    """``{% generation %}`` marks assistant text for trainers that mask by template; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance attribute)

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own tojson escapes HTML, which is no part of a prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """One compiled chat template.

    ``special_tokens`` are the names a template reads besides the messages (``bos_token``, ``eos_token``, …).
    Raises ValueError naming ``place`` if the template is not valid jinja2.
    """

    def __init__(self, template: str, special_tokens: Mapping[str, str], place: str) -> None:
        self._special_tokens = dict(special_tokens)
        self._place = place
        try:
            self._template = _environment().from_string(template)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{place}: chat_template is not valid jinja2: line {error.lineno}: {error}") from error

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation, up to and with the header of the assistant's next turn.

        Raises ValueError with the template's own words when it refuses the messages (an unknown role, say).
        """
        try:
            return self._template.render(
                messages=list(messages), tools=None, documents=None, add_generation_prompt=True, **self._special_tokens
            )
        except (jinja2.TemplateError, TypeError) as error:
            roles = [message.get("role") for message in messages]
            raise ValueError(
                f"{self._place}: the chat template refuses messages with roles {roles}: {error}"
            ) from error
