"""One row of prompt data: its fields, and the rule for each field."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from megatron_dypo.data.formats import Columns
from megatron_dypo.data.tokenizer.chat import Message
from megatron_dypo.data.traces import read_traces
from megatron_dypo.data.values import (
    Absent,
    Broken,
    HugeInteger,
    check_characters,
    check_tree,
    lookup,
    parse_json,
    printable,
    shown,
)


class BadRow(ValueError):  # noqa: N818 (it is collected into one ValueError, never shown by its name)
    """A row that breaks rules. ``problems`` has one text ``field=value: rule`` for each."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """A row of prompt data before it is tokenised."""

    prompt_id: str
    prompt: str | list[Message]
    answer: Any
    """A string; an object or a list as the file has it."""
    source: str
    traces: Mapping[str, str]
    """Teacher name → text, for the teachers that the row has."""
    num_failed_checks: int = 0
    """Number of traces left out because a column of ``data.fields.trace_checks`` is not true."""
    verifier: str | None = None
    row: Mapping[str, Any] = field(default_factory=dict)
    """The columns from which no field is read; empty without ``data.keep_row``."""


def parse_row(
    record: object, columns: Columns, *, default_id: str, default_source: str, keep_row: bool = False
) -> PromptRow:
    """Check one record and convert its fields.

    A null in an optional field or in place of one teacher's trace counts as missing, and so does an empty source.
    Raises :class:`BadRow` with every broken rule.
    """
    if not isinstance(record, dict):
        raise BadRow(f"{shown(record)}: must be an object")
    reader = _Reader(record)
    traces, num_failed_checks = reader.traces(columns)
    row = PromptRow(
        prompt_id=reader.optional(columns.id, _identifier, default_id),
        prompt=reader.required(columns.prompt, _prompt),
        answer=reader.required(columns.answer, _answer),
        source=reader.optional(columns.source, _source, None) or default_source,
        traces=traces,
        num_failed_checks=num_failed_checks,
        verifier=reader.optional(columns.verifier, _text, None),
        row=reader.rest(columns) if keep_row else {},
    )
    if reader.problems:
        raise BadRow(*reader.problems)
    return row


class _Reader:
    """Reads the fields of one record and collects their problems."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self._record = record
        self.problems: list[str] = []

    def required(self, name: str, check: Callable[[Any], Any]) -> Any:
        value = self._found(name)
        if value is Absent.MISSING:
            has = ", ".join(printable(str(key)) for key in self._record) or "no field"
            self.problems.append(f"{name}: is missing (the row has {_shortened(has)})")
            return None
        return self._checked(name, value, check)

    def optional(self, name: str, check: Callable[[Any], Any], default: Any) -> Any:
        value = self._found(name) if name else None
        return default if value is None or value is Absent.MISSING else self._checked(name, value, check)

    def traces(self, columns: Columns) -> tuple[dict[str, str], int]:
        checks = [(name, self._found(name)) for name in columns.trace_checks]
        given = [(name, value) for name, value in checks if value is not None and value is not Absent.MISSING]
        traces: dict[str, str] = {}
        num_failed = 0
        for name in columns.traces:
            read = functools.partial(read_traces, name, checks=given)
            # None if a broken rule was noted.
            found, failed = self.optional(name, read, None) or ({}, 0)
            twice = sorted(traces.keys() & found.keys())
            if twice:
                self.problems.append(f"{name}: has a trace of {twice[0]!r}, and so has another column")
            traces.update(found)
            num_failed += failed
        return traces, num_failed

    def rest(self, columns: Columns) -> dict[str, Any]:
        unnamed = {k: v for k, v in self._record.items() if k not in columns.names}
        kept: dict[str, Any] = self._checked("the row", unnamed, _kept)
        return kept

    def _found(self, name: str) -> Any:
        try:
            return lookup(self._record, name)
        except Broken as broken:
            self._report(name, broken)
            return None

    def _checked(self, name: str, value: Any, check: Callable[[Any], Any]) -> Any:
        try:
            return check(value)
        except Broken as broken:
            self._report(name, broken)
            return None

    def _report(self, name: str, broken: Broken) -> None:
        self.problems.append(f"{name}{printable(broken.part)}={shown(broken.value)}: {broken.rule}")


def _shortened(text: str) -> str:
    """Cut a list of names that is too long to read."""
    return text if len(text) <= 200 else text[:197] + "..."


def _text(value: Any, part: str = "") -> str:
    if not isinstance(value, str):
        raise Broken(value, "must be a string", part)
    if not value.strip():
        raise Broken(value, "must not be empty", part)
    check_characters(value, part)
    return value


def _source(value: Any) -> str:
    return _text(value) if value != "" else ""


def _number_or_text(value: Any, rule: str) -> str:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, HugeInteger):
        raise Broken(value, "is too long for a number: write it as a string")
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal) or not math.isfinite(value):
        raise Broken(value, rule)
    return str(value)


def _identifier(value: Any) -> str:
    if isinstance(value, float | Decimal):
        raise Broken(value, "must be a string or an integer")
    return _number_or_text(value, "must be a string or an integer")


def _answer(value: Any) -> Any:
    if isinstance(value, dict | list) and value:
        check_tree(value)
        return value
    return _number_or_text(value, "must be a string, a finite number, or an object or list that is not empty")


def _prompt(value: Any) -> str | list[Message]:
    if isinstance(value, str):
        messages = _messages_in(value)
        if messages is None:
            return _text(value)
        value = messages
    if not isinstance(value, list) or not value:
        raise Broken(value, "must be a string or a list of chat messages")
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            raise Broken(message, "must be an object with `role` and `content`", f"[{index}]")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise Broken(message.get(key), "must be a string", f"[{index}].{key}")
    if not any(message["content"].strip() for message in value):
        raise Broken(value, "has no message with content")
    check_tree(value)
    return value


def _messages_in(text: str) -> list[Message] | None:
    """Return chat messages that are written as JSON in a string, as in table formats without lists."""
    if not (text.startswith("[") and '"role"' in text and '"content"' in text):
        return None
    try:
        value = parse_json(text)
    except Broken:
        return None
    is_chat = all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in value)
    return value if is_chat else None


def _kept(value: Any) -> Any:
    for name, item in value.items():
        try:
            _check_kept(item)
        except Broken as broken:
            raise Broken(broken.value, broken.rule, f".{name}{broken.part}") from broken
    return value


def _check_kept(value: Any) -> None:
    # Parquet also has dates, decimals and bytes, which a verifier may accept.
    if isinstance(value, str | list | dict | HugeInteger):
        check_tree(value)
