"""A verifier's imported function, ready to be called on the pairs that the trainer sends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dypo.grading.workers.results import shown
from megatron_dypo.grading.workers.signature import Signature, read_signature
from megatron_dypo.processes.importing import import_name


@dataclass(frozen=True, kw_only=True, eq=False)
class Caller:
    """One function and how to call it."""

    function: Callable[..., Any]
    signature: Signature
    options: Mapping[str, Any]
    """Keyword arguments of every call."""
    is_built_in: bool
    """Whether it is one of our verifiers. They compare text. An answer that is a number becomes text; anything else is
    an error."""

    def call(self, values: Mapping[str, Any]) -> Any:
        """Call the function on one pair: field → value."""
        if self.is_built_in and "answer" in values:
            values = {**values, "answer": _gold_text(values["answer"])}
        positional = [values[field] for field in self.signature.positional]
        return self.function(*positional, **{p: values[field] for p, field in self.signature.by_name}, **self.options)

    def call_batch(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """Call a batched function: each parameter gets a list."""
        return self.call({field: [row[field] for row in rows] for field in self.signature.fields})


def load_caller(import_path: str, options: Mapping[str, Any], *, is_built_in: bool) -> Caller:
    """Import ``pkg.module:function``. Raises ValueError naming the part that is wrong."""
    function = import_name(import_path)
    module_name, _, name = import_path.partition(":")
    if not callable(function):
        raise ValueError(f"module {module_name} has no function {name!r}")
    try:
        signature = read_signature(function, ignored=tuple(options))
    except ValueError as error:
        raise ValueError(f"function {name}: {error}") from error
    return Caller(function=function, signature=signature, options=options, is_built_in=is_built_in)


def _gold_text(answer: Any) -> str:
    if isinstance(answer, str):
        return answer
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return str(answer)
    raise TypeError(f"answer={shown(answer)}: a built-in verifier compares text; objects need a verifier of your own")
