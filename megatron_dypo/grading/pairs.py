"""One response with the fields that a verifier may ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_dypo.types import Prompt


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """A response to judge, the gold answer, and the row that they belong to."""

    response: str
    answer: Any
    """Text, or an object for a verifier of the user's own."""
    prompt: str = ""
    """The prompt as the model saw it."""
    source: str = ""
    prompt_id: str = ""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns."""
    verifier: str | None = None
    """The row's own verifier."""


def pair_of(prompt: Prompt, response: str) -> Pair:
    """Pair a response with the row of its prompt."""
    return Pair(
        response=response,
        answer=prompt.answer,
        prompt=prompt.text,
        source=prompt.source,
        prompt_id=prompt.prompt_id,
        row=prompt.row,
        verifier=prompt.verifier,
    )


def values_of(pair: Pair, fields: tuple[str, ...]) -> dict[str, Any]:
    """Return the requested fields of a pair: the fields of :class:`Pair`, and ``extra_info``.

    ``extra_info`` is the row's column of that name ({} without one), which functions for verl take.
    """
    values = {}
    for name in fields:
        if name == "extra_info":
            values[name] = pair.row.get("extra_info", {})
        else:
            value = getattr(pair, name)
            values[name] = dict(value) if name == "row" else value  # a read-only view cannot be sent
    return values
