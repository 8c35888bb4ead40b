"""A verifier's function, imported and ready to be called on what the trainer sent."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dypo.grading.workers.results import shown
from megatron_dypo.grading.workers.signature import Signature, read_signature

_OWN_CODE = str(Path(__file__).resolve().parents[1])
"""The room of grading: a place in it tells the author of a verifier nothing."""
_MAX_ERROR_CHARACTERS = 500


@dataclass(frozen=True, kw_only=True, eq=False)
class Caller:
    """One function with the way to call it."""

    function: Callable[..., Any]
    signature: Signature
    options: Mapping[str, Any]
    """Keyword arguments of every call."""
    wants_text: bool
    """The answer must be text (a number becomes text); anything else is an error."""

    def call(self, values: Mapping[str, Any]) -> Any:
        """Call the function on one pair: field → value."""
        if self.wants_text and "answer" in values:
            values = {**values, "answer": _gold_text(values["answer"])}
        positional = [values[field] for field in self.signature.positional]
        return self.function(*positional, **{p: values[field] for p, field in self.signature.by_name}, **self.options)

    def call_batch(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """Call a batched function: each parameter gets a list."""
        return self.call({field: [row[field] for row in rows] for field in self.signature.fields})


def load_caller(import_path: str, options: Mapping[str, Any], *, wants_text: bool) -> Caller:
    """Import ``pkg.module:function``. Raises ValueError naming the part that is wrong."""
    module_name, _, name = import_path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"cannot import {module_name}: {printable(str(error))}") from error
    except BaseException as error:
        raise ValueError(f"cannot import {module_name}: {describe(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"module {module_name} has no function {name!r}")
    try:
        signature = read_signature(function, ignored=tuple(options))
    except ValueError as error:
        raise ValueError(f"function {name}: {error}") from error
    return Caller(function=function, signature=signature, options=options, wants_text=wants_text)


def describe(error: BaseException) -> str:
    """Return one line for what foreign code raised: ``KeyError: 'unit' (my_rewards.py:12)``."""
    try:
        text = str(error)
    except BaseException as second:  # noqa: BLE001 (the message is foreign code too)
        text = f"its message cannot be shown, {type(second).__name__}"
    frames = traceback.extract_tb(error.__traceback__)
    is_ours = not frames or frames[-1].filename.startswith(_OWN_CODE)
    place = "" if is_ours else f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
    return printable(f"{type(error).__name__}: {text}"[: 4 * _MAX_ERROR_CHARACTERS], place)


def printable(text: str, place: str = "") -> str:
    """Return ``text`` in one line of at most 500 characters that any stream can print, with ``place`` at its end."""
    line = " ".join(text.split()).encode("utf-8", "backslashreplace").decode("utf-8")
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)
    limit = _MAX_ERROR_CHARACTERS - len(place)
    return (line if len(line) <= limit else f"{line[: limit - 1]}…") + place


def _gold_text(answer: Any) -> str:
    if isinstance(answer, str):
        return answer
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return str(answer)
    raise TypeError(f"answer={shown(answer)}: a built-in verifier compares text; objects need a verifier of your own")
