"""Handle the values in a row of prompt data: read JSON, find a field, check texts, show a value in a message."""

from __future__ import annotations

import enum
import json
import math
import reprlib
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

MAX_DEPTH = 32
"""Levels of lists and objects that a value may have."""
_MAX_DIGITS = 4300
"""Most digits of an integer that Python converts by default (sys.int_info.default_max_str_digits)."""


class Broken(Exception):  # noqa: N818 (it becomes a line of a BadRow; its own name is never shown)
    """A value that breaks a rule; ``part`` says where in its field it is (``[0].content``)."""

    def __init__(self, value: object, rule: str, part: str = "") -> None:
        super().__init__(rule)
        self.value, self.rule, self.part = value, rule, part


class HugeInteger:
    """The stand-in for an integer that is too long to convert. It is an error only if a field uses it."""

    def __init__(self, digits: int) -> None:
        self._digits = digits

    def __repr__(self) -> str:
        return f"<integer of {self._digits} digits>"


class LongFloat(float):
    """A number with more digits than a float holds. Its value is the float; its text is the row's."""

    def __new__(cls, text: str) -> LongFloat:
        number = super().__new__(cls, text)
        number._text = text
        return number

    _text: str

    def __str__(self) -> str:
        return self._text


def parse_json(text: str) -> Any:
    """Read one JSON value. Raises :class:`Broken` if the text is not JSON, or an object has a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_int=_integer, parse_float=_float)
    except json.JSONDecodeError as error:
        raise Broken(text, f"is not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise Broken(text, "is nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Broken(members, f"has the key {shown(twice)} twice")
    return members


def _integer(text: str) -> int | HugeInteger:
    return int(text) if len(text) <= _MAX_DIGITS else HugeInteger(len(text.lstrip("-")))


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        return number  # refused later, if a field uses it
    try:
        exact = Decimal(text) == Decimal(repr(number))
    except InvalidOperation:  # for example an exponent of twenty digits
        exact = False
    return number if exact else LongFloat(text)


class Absent(enum.Enum):
    """The answer for a field that a record lacks, as opposed to a field that is null."""

    MISSING = "missing"


def lookup(record: Mapping[str, Any], name: str) -> Any:
    """Return the field ``name`` of a record; ``Absent.MISSING`` if the record has none.

    A key equal to ``name`` wins. Otherwise ``a.b`` is the field ``b`` of the object ``a``, which may also be a string
    that holds the object as JSON. Raises :class:`Broken` if ``a`` is present and not an object.
    """
    if name in record:
        return record[name]
    dots = [index for index, character in enumerate(name) if character == "."]
    for dot in reversed(dots):
        head, rest = name[:dot], name[dot + 1 :]
        if record.get(head) is None:
            continue
        inner = record[head]
        if isinstance(inner, str):
            inner = parse_json(inner)
        if not isinstance(inner, Mapping):
            raise Broken(record[head], f"must be an object with the field `{rest}`")
        found = lookup(inner, rest)
        if found is not Absent.MISSING:
            return found
    return Absent.MISSING


def has_field(record: Mapping[str, Any], name: str) -> bool:
    """Tell whether a record has the field ``name``. A field that cannot be read counts: its own error is reported."""
    try:
        return lookup(record, name) is not Absent.MISSING
    except Broken:
        return True


def check_characters(text: str, part: str = "") -> None:
    """Raise :class:`Broken` if a text has a NUL or a lone surrogate: no tokenizer or server accepts them."""
    if "\0" in text:
        raise Broken(text, f"has a NUL character at index {text.index(chr(0))}", part)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Broken(text, f"has a lone surrogate at index {error.start}: half a character", part) from error


def check_tree(value: object) -> None:
    """Raise :class:`Broken` if JSON in UTF-8 cannot hold a part of a nested value, or if it is nested too deeply."""
    stack: list[tuple[object, str, int]] = [(value, "", 0)]
    while stack:
        node, part, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise Broken(value, f"must not be nested deeper than {MAX_DEPTH} levels")
        if isinstance(node, str):
            check_characters(node, part)
        elif isinstance(node, Mapping):
            for key, item in node.items():
                if not isinstance(key, str):
                    raise Broken(key, "a key must be a string", part)
                check_characters(key, part)
                stack.append((item, f"{part}.{key}", depth + 1))
        elif isinstance(node, list | tuple):
            stack += [(item, f"{part}[{index}]", depth + 1) for index, item in enumerate(node)]
        elif isinstance(node, float):
            if not math.isfinite(node):
                raise Broken(node, "must be finite", part)
        elif not isinstance(node, int | None):
            raise Broken(node, "must be a value of JSON", part)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlevel = 4


def shown(value: object) -> str:
    """Return any value as text of at most 80 characters."""
    text = printable(_SHORT.repr(value))
    return text if len(text) <= 80 else text[:77] + "..."


def printable(text: str) -> str:
    """Escape what a terminal or a log cannot show: control characters, line breaks, lone surrogates."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
