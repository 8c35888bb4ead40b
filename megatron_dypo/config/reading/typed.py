"""A nested mapping read into a dataclass, with one message for each problem."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")

_SHOWN = 200


def read_typed(
    kind: type[T], tree: Mapping[str, Any], gone: Mapping[str, str] | None = None
) -> tuple[T | None, list[str]]:
    """Return ``tree`` as a ``kind`` with an empty list, or None with the problems. Each problem begins with its key.

    Args:
        gone: dotted keys that no longer exist, each with a hint.
    """
    problems = unknown_keys(tree, kind, gone=gone)
    if problems:
        return None, problems
    try:
        read = _adapter(cast(Any, kind)).validate_python(dict(tree))
    except ValidationError as error:
        return None, list(_explain(error, kind))
    problems = list(_booleans_for_numbers(tree, read, ""))
    return (None if problems else read), problems


def shortened(text: str) -> str:
    """Return ``text``, cut where it is long."""
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def nearest(name: str, known: Iterable[str], *, before: str = "", otherwise: str) -> str:
    """Return ``did you mean …?`` with the nearest known name (``before`` stands in front of it). If none is near,
    return ``otherwise`` and all known names."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {before}{near[0]}?" if near else f"{otherwise}: {', '.join(known)}"


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    """Build pydantic's validator, which takes a tenth of a second for the whole config."""
    return TypeAdapter(kind)


def _section_of(hint: Any) -> type | None:
    """Return the dataclass that a mapping under ``hint`` is read into, or None."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)), None)


def section_of_mapping(hint: Any) -> type | None:
    """Return the dataclass that the values of a mapping are read into; None for other types."""
    origin = get_origin(hint)
    values = get_args(hint)[1:] if isinstance(origin, type) and issubclass(origin, Mapping) else ()
    return values[0] if values and isinstance(values[0], type) and dataclasses.is_dataclass(values[0]) else None


def unknown_keys(
    tree: Mapping[str, Any], section: type, path: tuple[str, ...] = (), gone: Mapping[str, str] | None = None
) -> list[str]:
    """Return a message for each key of ``tree`` that ``section`` lacks, with the nearest known key."""
    hints, problems, gone = get_type_hints(section), [], gone or {}
    for key, value in tree.items():
        dotted = ".".join((*path, str(key)))
        if dotted in gone:
            problems.append(f"{dotted}: unknown key; {gone[dotted]}")
        elif key not in hints:
            before = "".join(f"{part}." for part in path)
            problems.append(f"{dotted}: unknown key; {nearest(str(key), hints, before=before, otherwise='known keys')}")
        elif (inner := _section_of(hints[key])) is not None and isinstance(value, Mapping):
            problems += unknown_keys(value, inner, (*path, key), gone)
        elif dataclasses.is_dataclass(hints[key]):
            problems.append(f"{dotted}={shortened(repr(value))}: must be a mapping")
        elif (inner := section_of_mapping(hints[key])) is not None and isinstance(value, Mapping):
            for name, item in value.items():
                if isinstance(item, Mapping):
                    problems += unknown_keys(item, inner, (*path, key, str(name)), gone)
                else:
                    problems.append(f"{dotted}.{name}={shortened(repr(item))}: must be a mapping")
    return problems


def _booleans_for_numbers(given: Any, read: Any, path: str) -> Iterable[str]:
    """Yield a message for each ``true`` or ``false`` that pydantic read as the number 1 or 0."""
    if isinstance(given, bool) and isinstance(read, int | float) and not isinstance(read, bool):
        yield f"{path}={str(given).lower()}: must be a number"
    elif isinstance(given, Mapping):
        for key, value in given.items():
            inner = getattr(read, key) if dataclasses.is_dataclass(read) else read[key]
            yield from _booleans_for_numbers(value, inner, f"{path}.{key}" if path else str(key))
    elif isinstance(given, list) and isinstance(read, list | tuple):
        for value, inner in zip(given, read, strict=True):
            yield from _booleans_for_numbers(value, inner, path)


def _explain(error: ValidationError, kind: type) -> Iterable[str]:
    for item in error.errors():
        where = ".".join(_place(item["loc"], kind))
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "value_error":  # a rule of ours, whose message names field and value
            yield f"{where}.{message}" if where else message
        elif item["type"] == "missing":
            yield f"{where}: is required"
        else:
            yield f"{where}={shortened(repr(item['input']))}: {message}"


def _place(loc: Sequence[str | int], kind: type) -> Iterable[str]:
    """Yield the parts of a dotted key, without the names of union types that pydantic adds to them."""
    hint: Any = kind
    for part in loc:
        if dataclasses.is_dataclass(hint):
            hint = get_type_hints(hint)[str(part)]
        elif get_origin(hint) in (Union, types.UnionType):
            several = [one for one in get_args(hint) if one is not type(None)]
            if len(several) > 1:  # pydantic names the member of the union that it tried
                section = _section_of(hint)
                hint = section if section is not None and part == section.__name__ else None
                continue
            hint = several[0]
        yield str(part)
