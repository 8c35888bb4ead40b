"""Reading JSON files that other programs wrote. Any fault is one ValueError that names the file."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_DEPTH = 100
"""Most levels of nested objects and lists; a model's own files have three or four."""
_MAX_DIGITS = 4300  # Python refuses to read longer integers
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80


class _LongInteger:
    """Placeholder for an integer with too many digits, until the name of its field is known."""

    def __init__(self, text: str) -> None:
        self.num_digits = len(text.lstrip("-"))


def shown(value: object) -> str:
    """Return ``repr(value)``, shortened so that a message stays one line."""
    return _REPR.repr(value)


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object of a UTF-8 JSON file.

    NaN and Infinity are read as floats; the code that reads a field decides whether it allows them.

    Raises:
        ValueError: no file, a git-lfs pointer, not UTF-8, not JSON, no object at the top level, a field given twice
            with different values, an integer of more than 4,300 digits, or more than ``MAX_DEPTH`` levels.
    """
    content = read_bytes(path)
    try:
        value = json.loads(content.decode(), parse_int=_integer, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8: byte {error.start} is {content[error.start : error.start + 1]!r}"
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: must not be nested deeper than {MAX_DEPTH} levels") from error
    except _RepeatedFieldError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object at the top, got {shown(value)}")
    for name, depth, inner in _walk(value):
        if depth > MAX_DEPTH:
            raise ValueError(f"{path}: {name}: must not be nested deeper than {MAX_DEPTH} levels")
        if isinstance(inner, _LongInteger):
            raise ValueError(
                f"{path}: {name}: an integer of {inner.num_digits} digits; at most {_MAX_DIGITS} can be read"
            )
    return value


def read_bytes(path: Path) -> bytes:
    """Return the content of a small file.

    Raises:
        ValueError: the file does not exist, cannot be read, or is a git-lfs pointer.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    refuse_lfs_pointer(path, content)
    return content


def refuse_lfs_pointer(path: Path, beginning: bytes) -> None:
    """Raise ValueError if ``beginning`` is that of a pointer to a file that git-lfs has not fetched."""
    if beginning.startswith(_LFS_POINTER):
        raise ValueError(f"{path}: a git-lfs pointer, not the file itself: run `git lfs pull` in {path.parent}")


class _RepeatedFieldError(Exception):
    """A field occurs twice in one object, with different values."""


def _integer(text: str) -> int | _LongInteger:
    return int(text) if len(text) <= _MAX_DIGITS else _LongInteger(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found and repr(found[name]) != repr(value):
            raise _RepeatedFieldError(f"{name}: is given twice, as {shown(found[name])} and as {shown(value)}")
        found[name] = value
    return found


def _walk(top: dict[str, Any]) -> Iterator[tuple[str, int, Any]]:
    """Yield every value below ``top`` with its dotted name and depth, never deeper than ``MAX_DEPTH`` + 1."""
    waiting: list[tuple[str, int, Any]] = [("", 0, top)]
    while waiting:
        name, depth, value = waiting.pop()
        yield name, depth, value
        if depth > MAX_DEPTH:
            continue
        if isinstance(value, dict):
            waiting += [(f"{name}.{key}".lstrip("."), depth + 1, inner) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{name}[{i}]", depth + 1, inner) for i, inner in enumerate(value)]
