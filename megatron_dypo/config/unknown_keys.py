"""Keys of a config that no section has, and what a key that exists should hold."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints

_GONE = {
    "rollout.servers.count": "did you mean rollout.servers.per_node (servers that one node runs)? The number "
    "of rollout nodes is rollout.servers.nodes",
    "eval.prompts": "did you mean eval.sets, a mapping from a set's name to {path: FILE}?",
}
"""Keys that no longer exist, each with the keys to use instead."""


def unknown_keys(tree: Mapping[str, Any], section: type, path: tuple[str, ...]) -> list[str]:
    """Return a message for each key of ``tree`` that ``section`` lacks, with the nearest known key."""
    hints, problems = get_type_hints(section), []
    for key, value in tree.items():
        dotted = ".".join((*path, str(key)))
        if dotted in _GONE:
            problems.append(f"{dotted}: unknown key; {_GONE[dotted]}")
        elif key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            hint = f"did you mean {'.'.join((*path, near[0]))}?" if near else f"known keys: {', '.join(hints)}"
            problems.append(f"{dotted}: unknown key; {hint}")
        elif dataclasses.is_dataclass(hints[key]):
            problems += _unknown_in(value, hints[key], (*path, key))
        elif (inner := section_of_mapping(hints[key])) is not None and isinstance(value, Mapping):
            for name, item in value.items():
                problems += _unknown_in(item, inner, (*path, key, str(name)))
    return problems


def _unknown_in(value: Any, section: type, path: tuple[str, ...]) -> list[str]:
    if isinstance(value, Mapping):
        return unknown_keys(value, section, path)
    return [f"{'.'.join(path)}={shortened(repr(value))}: must be a mapping"]


def section_of_mapping(hint: Any) -> type | None:
    """Return the dataclass that a mapping's values are of; None for other types."""
    values = get_args(hint)[1:] if isinstance(get_origin(hint), type) and issubclass(get_origin(hint), Mapping) else ()
    return values[0] if values and isinstance(values[0], type) and dataclasses.is_dataclass(values[0]) else None


def shortened(text: str) -> str:
    """Return a text, cut where it is too long for a message."""
    return text if len(text) <= 200 else text[:197] + "..."
