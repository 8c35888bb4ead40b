"""A ``megatron`` mapping of the config read into values for a dataclass of the installed Megatron.

Names and types are those of the installed version (``dataclasses.fields``, ``typing.get_type_hints``). A type of torch
is written by its name (``bfloat16``), a member of an enumeration by its name (``flash``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import importlib.metadata
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

from megatron_dypo.config.reading.typed import nearest, shortened
from megatron_dypo.mcore.options.denied import Rows, reason_against

T = TypeVar("T")


class _OtherTypeError(Exception):
    """A value is not of the type of its field."""


class Mapped(NamedTuple):
    """One ``megatron`` mapping of the config."""

    key: str
    """``model.megatron``."""
    given: Mapping[str, Any]
    denied: Rows


def make(kind: type[T], mapped: Mapped, named: Mapping[str, Any] | None = None, /, **own: Any) -> T:
    """Return a ``kind`` of this package's own values and those of the mapping.

    Args:
        named: keys of the config among the ``own`` values that Megatron may refuse, for the message.

    Raises:
        ValueError: one line for each name that is denied or unknown, or whose value has another type; or Megatron
            refuses the values together.
    """
    values = read_options(kind, mapped)
    with refusals(mapped, named):
        return kind(**{**own, **values})


@contextlib.contextmanager
def refusals(mapped: Mapped, named: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Run a block in which Megatron checks values together, and name the config's keys if it refuses them.

    Args:
        named: keys of the config among this package's own values that Megatron may refuse.

    Raises:
        ValueError: Megatron refuses the values. An error of values that no key sets is raised as it is: a bug here.
    """
    try:
        yield
    except (ValueError, AssertionError, RuntimeError) as error:
        shown = {**(named or {}), **({mapped.key: dict(mapped.given)} if mapped.given else {})}
        if not shown:
            raise
        keys = ", ".join(f"{key}={value}" for key, value in shown.items())
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{keys}: {_version()} refuses this: {said}") from error


def read_options(kind: type, mapped: Mapped) -> dict[str, Any]:
    """Return the values of the mapping, each in the type of its field in ``kind``.

    Raises:
        ValueError: one line for each problem, with key, value and rule.
    """
    if not mapped.given:
        return {}
    names = [field.name for field in dataclasses.fields(kind) if field.init and not field.name.startswith("_")]
    hints, allowed = get_type_hints(kind), [name for name in names if reason_against(name, mapped.denied) is None]
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    values, problems = {}, []
    for name, value in mapped.given.items():
        shown = f"{mapped.key}.{name}={shortened(repr(value))}"
        if reason := reason_against(name, mapped.denied):
            problems.append(f"{shown}: cannot be set here: {reason}")
        elif name not in names:
            hint = nearest(name, allowed, before=f"{mapped.key}.", otherwise="its fields that can be set")
            problems.append(f"{shown}: {kind.__name__} of {_version()} has no such field; {hint}")
        else:
            try:
                values[name] = None if value is None and defaults[name] is None else _read(hints[name], value)
            except _OtherTypeError:
                problems.append(f"{shown}: must be {_in_words(hints[name])}")
    if problems:
        raise ValueError("\n".join(problems))
    return values


def _read(hint: Any, value: Any) -> Any:
    """Return a value of YAML as the type ``hint`` has it, or raise :class:`_OtherTypeError`."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _first_that_takes(parts, value)
    if origin is Literal:
        return _if(any(value == part and type(value) is type(part) for part in parts), value)
    if hint is type(None):
        return _if(value is None, value)
    if hint is torch.dtype:
        found = getattr(torch, value, None) if isinstance(value, str) else None
        return _if(isinstance(found, torch.dtype), found)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint[value] if isinstance(value, str) and value in hint.__members__ else _if(False, value)
    if (origin or hint) in (list, tuple):
        return _read_sequence(origin or hint, parts, value)
    if hint is float:
        return _if(isinstance(value, int | float) and not isinstance(value, bool), value)
    return _if(hint in (bool, int, str) and type(value) is hint, value)


def _first_that_takes(hints: Sequence[Any], value: Any) -> Any:
    for hint in hints:
        try:
            return _read(hint, value)
        except _OtherTypeError:
            continue
    raise _OtherTypeError


def _read_sequence(kind: Callable[[list[Any]], Any], parts: Sequence[Any], value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise _OtherTypeError
    if kind is tuple and parts and parts[-1] is not Ellipsis:
        _if(len(parts) == len(value), value)
        return tuple(_read(part, item) for part, item in zip(parts, value, strict=True))
    return kind([_read(parts[0], item) if parts else item for item in value])


def _if(condition: bool, value: Any) -> Any:
    if not condition:
        raise _OtherTypeError
    return value


def _in_words(hint: Any) -> str:
    """Name a type as a user of YAML would, for "must be …"."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_in_words(part) for part in parts))
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if hint is torch.dtype:
        return "a type of torch, such as bfloat16"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return f"one of {', '.join(hint.__members__)}"
    if (origin or hint) in (list, tuple):
        return f"a list of values that are each {_in_words(parts[0])}" if parts else "a list"
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a text", type(None): "null"}
    return words.get(hint, "an object of Python, which a config cannot hold")


def _version() -> str:
    return f"megatron-core {importlib.metadata.version('megatron-core')}"
