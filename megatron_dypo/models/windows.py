"""The layers of gpt-oss whose attention sees only a window, as its HF ``config.json`` describes them: plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_dypo.models.hf.fields import Fields

_WINDOWED, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The layers whose attention sees only the last tokens."""

    size: int
    """Number of last tokens that attention sees, the token itself included."""
    layers: tuple[int, ...]
    """Those layers, counted from 0."""


def windows_from_data(fields: Mapping[str, Any] | None) -> Windows | None:
    """Return the windows from their ``dataclasses.asdict``."""
    return None if fields is None else Windows(size=fields["size"], layers=tuple(fields["layers"]))


def read_windows(fields: Fields, num_layers: int) -> Windows | None:
    """Return the windows of a config; None if every layer sees all tokens.

    Raises:
        ValueError: ``layer_types`` or ``sliding_window`` is out of its range.
    """
    kinds = fields.get("layer_types")
    if kinds is None:
        kinds = [_FULL if layer % 2 else _WINDOWED for layer in range(num_layers)]
    if not isinstance(kinds, list) or len(kinds) != num_layers or not set(map(str, kinds)) <= {_WINDOWED, _FULL}:
        fields.refuse("layer_types", f"must list num_hidden_layers={num_layers} times {_WINDOWED!r} or {_FULL!r}")
    layers = tuple(layer for layer, kind in enumerate(kinds) if kind == _WINDOWED)
    return Windows(size=fields.integer("sliding_window", 128), layers=layers) if layers else None
