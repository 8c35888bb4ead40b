"""One row of prompt data: what it holds, and the rule for each field."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_dypo.config.data import DataFieldsConfig
from megatron_dypo.data.chat import Message


class BadRow(ValueError):  # noqa: N818 (it is collected into one ValueError, never shown by its name)
    """A row that breaks rules; ``problems`` has one ``field=value: rule`` for each."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """A row of prompt data before it is tokenised."""

    prompt_id: str
    prompt: str | list[Message]
    answer: str
    source: str
    traces: Mapping[str, str]
    """Teacher name → text, for the teachers that the row has."""


def parse_row(record: object, fields: DataFieldsConfig, *, default_id: str, default_source: str) -> PromptRow:
    """Check one record and give its fields their types.

    A null in an optional field, or in place of one teacher's trace, is the same as its absence. Raises
    :class:`BadRow` with every broken rule.
    """
    if not isinstance(record, dict):
        raise BadRow(f"{_shown(record)}: must be an object")
    reader = _Reader(record)
    row = PromptRow(
        prompt_id=reader.optional(fields.id, _identifier, default_id),
        prompt=reader.required(fields.prompt, _prompt),
        answer=reader.required(fields.answer, _answer),
        source=reader.optional(fields.source, _text, default_source),
        traces=reader.optional(fields.traces, _traces, {}),
    )
    if reader.problems:
        raise BadRow(*reader.problems)
    return row


class _Broken(Exception):  # noqa: N818 (never leaves this file)
    def __init__(self, value: object, rule: str, part: str = "") -> None:
        super().__init__(rule)
        self.value, self.rule, self.part = value, rule, part


class _Reader:
    """Reads fields of one record and collects what is wrong with them."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self._record = record
        self.problems: list[str] = []

    def required(self, field: str, check: Callable[[Any], Any]) -> Any:
        if field not in self._record:
            self.problems.append(f"{field}: is missing (the row has {', '.join(map(str, self._record)) or 'no field'})")
            return None
        return self._checked(field, check)

    def optional(self, field: str, check: Callable[[Any], Any], default: Any) -> Any:
        return default if self._record.get(field) is None else self._checked(field, check)

    def _checked(self, field: str, check: Callable[[Any], Any]) -> Any:
        try:
            return check(self._record[field])
        except _Broken as broken:
            self.problems.append(f"{field}{broken.part}={_shown(broken.value)}: {broken.rule}")
            return None


def _text(value: Any, part: str = "") -> str:
    if not isinstance(value, str):
        raise _Broken(value, "must be a string", part)
    if not value.strip():
        raise _Broken(value, "must not be empty", part)
    return value


def _number_or_text(value: Any, rule: str) -> str:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _Broken(value, rule)
    return str(value)


def _identifier(value: Any) -> str:
    if isinstance(value, float):
        raise _Broken(value, "must be a string or an integer")
    return _number_or_text(value, "must be a string or an integer")


def _answer(value: Any) -> str:
    return _number_or_text(value, "must be a string or a finite number")


def _prompt(value: Any) -> str | list[Message]:
    if isinstance(value, str):
        return _text(value)
    if not isinstance(value, list) or not value:
        raise _Broken(value, "must be a string or a list of chat messages")
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            raise _Broken(message, "must be an object with `role` and `content`", f"[{index}]")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise _Broken(message.get(key), "must be a string", f"[{index}].{key}")
    return value


def _traces(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _Broken(value, "must be an object: teacher name → trace text")
    return {name: _text(text, f".{name}") for name, text in value.items() if text is not None}


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
