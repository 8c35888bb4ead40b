"""Read the traces of one row: the teacher of each, and whether it may be used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_dypo.data.values import Broken, check_characters, parse_json

_KINDS = "must be a text, a chat message, a list of them, or an object: teacher name → trace"


def read_traces(column: str, value: Any, checks: Sequence[tuple[str, Any]]) -> tuple[dict[str, str], int]:
    """Return teacher name → text for the value of one column, and how many of its traces failed a check.

    Traces without names are called after their column: ``target`` if the column holds one trace; ``generation_0``,
    ``generation_1``, … if the column ``generations`` holds a list. ``checks`` are (column, value) of columns of
    booleans; a trace must be true in all of them. Raises :class:`Broken`.
    """
    names, traces, parts = _named(column.rpartition(".")[2], value)
    passed = _passed(names, traces, checks)
    found = {}
    for name, trace, part, is_passed in zip(names, traces, parts, passed, strict=True):
        if trace is not None and is_passed:
            found[name] = _text_of(trace, part)
    num_failed = sum(trace is not None and not ok for trace, ok in zip(traces, passed, strict=True))
    return found, num_failed


def _named(column: str, value: Any) -> tuple[list[str], list[Any], list[str]]:
    """Return the names, the traces and their places in the value (``[0]``, ``.name``), in the value's order."""
    if isinstance(value, str) or _is_message(value) or _is_chat(value):
        return [column], [value], [""]
    if isinstance(value, list):
        singular = column[:-1] if column.endswith("s") and len(column) > 1 else column
        names = [f"{singular}_{index}" for index in range(len(value))]
        return names, list(value), [f"[{index}]" for index in range(len(value))]
    if not isinstance(value, Mapping):
        raise Broken(value, _KINDS)
    for name in value:
        if not isinstance(name, str) or not name.strip():
            raise Broken(name, "a teacher's name must be a string that is not empty")
        check_characters(name)
    return list(value), list(value.values()), [f".{name}" for name in value]


def _passed(names: Sequence[str], traces: Sequence[Any], checks: Iterable[tuple[str, Any]]) -> list[bool]:
    passed = [True] * len(names)
    for column, flags in checks:
        if isinstance(flags, Mapping):
            flags = [flags.get(name) for name in names]
        elif isinstance(flags, bool):
            flags = [flags]
        if not isinstance(flags, list) or len(flags) != len(names):
            raise Broken(flags, f"the column {column} must have a boolean for each of the {len(names)} traces")
        for index, flag in enumerate(flags):
            if flag is not None and not isinstance(flag, bool):
                raise Broken(flag, f"the column {column} must hold booleans", f"[{index}]")
            # A null does not pass.
            passed[index] = passed[index] and flag is True
    return passed


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("role") == "assistant" and "content" in value


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in value)
    )


def _text_of(trace: Any, part: str) -> str:
    if _is_chat(trace):
        answers = [message for message in trace if message["role"] == "assistant"]
        if len(answers) != 1 or trace[-1] is not answers[0]:
            raise Broken(trace, "a chat must end with its only message of the assistant", part)
        trace = trace[-1]
    if _is_message(trace):
        trace, part = trace["content"], f"{part}.content"
    if not isinstance(trace, str):
        raise Broken(trace, "must be a string", part)
    if not trace.strip():
        raise Broken(trace, "must not be empty", part)
    check_characters(trace, part)
    if not part and _is_json(trace):
        raise Broken(trace, "is an object or a list in a string: write the object itself")
    return trace


def _is_json(text: str) -> bool:
    # For a string that is the whole value of the column: it may be one trace, or all traces written as JSON.
    if not text.lstrip().startswith(("{", "[")):
        return False
    try:
        return isinstance(parse_json(text), dict | list)
    except Broken:
        return False
