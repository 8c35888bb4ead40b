"""The signature of a verifier's function: the names of its parameters determine what it gets."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Mode = Literal["one", "async", "batch"]

_FIELDS = {
    **{name: name for name in ("response", "answer", "prompt", "source", "prompt_id", "row")},
    # verl's names, so that its functions work as they are
    **{"solution_str": "response", "ground_truth": "answer", "data_source": "source", "extra_info": "extra_info"},
}
"""Parameter → field of a pair, see :func:`megatron_dypo.grading.pairs.values_of`."""
_PLURAL_FIELDS = {f"{name}s": field for name, field in _FIELDS.items()}
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True, kw_only=True)
class Signature:
    """The way to call one verifier."""

    mode: Mode
    """``one``: a pair at a time. ``async``: pairs of a batch at the same time. ``batch``: lists."""
    positional: tuple[str, ...]
    """Fields that are passed by position."""
    by_name: tuple[tuple[str, str], ...]
    """(parameter, field) of what is passed by keyword."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Every field that the function gets."""
        return tuple(dict.fromkeys([*self.positional, *(field for _, field in self.by_name)]))


def read_signature(function: Callable[..., Any], ignored: Sequence[str] = ()) -> Signature:
    """Decide from the names of its parameters what ``function`` gets.

    Parameters named ``response``, ``answer``, ``prompt``, ``source``, ``prompt_id`` and ``row`` get these fields.
    Without a parameter ``response``, the first two parameters of any name are the response and the answer; the same
    holds for ``(response, gold)``. A function with plural names (``responses``, …) is batched: it gets lists.
    ``**kwargs`` gets all other fields. ``ignored`` names parameters that are filled in elsewhere.

    Raises ValueError naming a parameter that cannot be filled.
    """
    try:
        parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in ignored]
    except (TypeError, ValueError):  # a builtin or C function: nothing is known but that it can be called
        return Signature(mode="one", positional=("response", "answer"), by_name=())
    names = {parameter.name for parameter in parameters}
    if is_batched := bool(names & _PLURAL_FIELDS.keys()):
        _require(not names & _FIELDS.keys(), f"mixes {_list(names & {*_FIELDS, *_PLURAL_FIELDS})}: all plural, or none")
    known = _PLURAL_FIELDS if is_batched else _FIELDS
    positional = _leading(parameters, known)
    by_name = _named(parameters[len(positional) :], known, positional)
    mode: Mode = "batch" if is_batched else "async" if _is_async(function) else "one"
    return Signature(mode=mode, positional=positional, by_name=by_name)


def _leading(parameters: Sequence[inspect.Parameter], known: dict[str, str]) -> tuple[str, ...]:
    """Fields to pass by position: the response and the answer, unless names say where the response goes."""
    places = [parameter for parameter in parameters if parameter.kind in _POSITIONAL][:2]
    if any(known.get(parameter.name) == "response" for parameter in parameters) and not _is_answer_unnamed(
        places, parameters, known
    ):
        only = [p for p in parameters if p.kind is inspect.Parameter.POSITIONAL_ONLY]
        for parameter in only:
            _require(parameter.name in known, f"its parameter {parameter.name!r} is none of {_list(known)}")
        return tuple(known[parameter.name] for parameter in only)
    if len(places) < 2 and any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return ("response", "answer")
    _require(len(places) == 2, "must take the response and the answer")
    for parameter, field in zip(places, ("response", "answer"), strict=True):
        _require(
            known.get(parameter.name, field) == field,
            f"its parameter {parameter.name!r} stands where the {field} is passed: name one `response`",
        )
    return ("response", "answer")


def _is_answer_unnamed(
    places: Sequence[inspect.Parameter], parameters: Sequence[inspect.Parameter], known: dict[str, str]
) -> bool:
    """Return whether these are ``(response, gold)``: the second has its own name, and nothing else is the answer."""
    return (
        len(places) == 2
        and known.get(places[0].name) == "response"
        and places[1].name not in known
        and places[1].default is inspect.Parameter.empty
        and not any(known.get(parameter.name) == "answer" for parameter in parameters)
    )


def _named(
    parameters: Sequence[inspect.Parameter], known: dict[str, str], positional: tuple[str, ...]
) -> tuple[tuple[str, str], ...]:
    named = {p.name: known[p.name] for p in parameters if p.name in known and p.kind not in _VARIABLE}
    for parameter in parameters:
        is_filled = parameter.name in named or parameter.kind in _VARIABLE or parameter.default is not parameter.empty
        _require(is_filled, f"its parameter {parameter.name!r} has no default and is none of {_list(known)}")
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        own = {name: field for name, field in known.items() if name.removesuffix("s") == field}
        taken = {*positional, *named.values()}
        named |= {name: field for name, field in own.items() if field not in taken and field != "extra_info"}
    return tuple(named.items())


def _is_async(function: Callable[..., Any]) -> bool:
    call = getattr(function, "__call__", None)  # noqa: B004 (an object whose __call__ is asynchronous)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise ValueError(rule)


def _list(names: object) -> str:
    return ", ".join(sorted(names))  # type: ignore[call-overload]
