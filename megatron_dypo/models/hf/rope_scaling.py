"""The rotary frequencies that an HF ``config.json`` defines, in the formats of transformers 4 and 5."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_dypo.models.hf.fields import Fields
from megatron_dypo.models.hf.json_file import shown

DEFAULT_THETA = 10_000.0
"""``rope_theta`` of every family if the config gives none (transformers, modeling_rope_utils.py)."""


@dataclass(frozen=True, kw_only=True)
class LinearRopeScaling:
    """All positions divided by ``factor`` (``rope_type: linear``)."""

    factor: float
    rope_type: str = "linear"


@dataclass(frozen=True, kw_only=True)
class Llama3RopeScaling:
    """Frequency scaling of Llama 3.1 (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    rope_type: str = "llama3"


@dataclass(frozen=True, kw_only=True)
class YarnRopeScaling:
    """YaRN (arXiv 2309.00071; ``rope_type: yarn``), with which Qwen models reach beyond 32,768 positions."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    """Multiplies the cosines and sines, and so the scores by its square; ``mscale`` and ``mscale_all_dim`` are in it.
    """
    served_attention_factor: float
    """The factor that SGLang 0.5 computes from the same fields: it ignores ``attention_factor``."""
    beta_fast: float = 32.0
    """Pairs that turn more often than this over the original positions keep their frequency."""
    beta_slow: float = 1.0
    """Frequencies of pairs that turn less often than this are divided by ``factor``; between the two bounds they are
    interpolated."""
    truncate: bool = True
    """Whether the two bounds are rounded to whole pairs."""
    mscale_all_dim: float = 0.0
    """Multi-head latent attention alone multiplies the scores by (0.1 · this · ln factor + 1)²; others ignore it."""
    rope_type: str = "yarn"


RopeScaling = LinearRopeScaling | Llama3RopeScaling | YarnRopeScaling

_CLASSES: dict[str, type[RopeScaling]] = {
    "linear": LinearRopeScaling,
    "llama3": Llama3RopeScaling,
    "yarn": YarnRopeScaling,
}
ROPE_SCALINGS = tuple(_CLASSES)

_MOST_FACTOR = 10_000.0
"""Largest factor. Factors in use are below 100, so a larger one than this is a mistake."""
SECTIONS = ("rope_parameters", "rope_scaling")
"""Objects of a config that describe rotary positions: transformers 5's name, transformers 4's name."""
_ORIGINAL = "original_max_position_embeddings"
_SHARE = "partial_rotary_factor"
_COMMON = {"rope_type", "type", "rope_theta", _SHARE, "finetuned"}  # the last says how it came to be
_KNOWN = {
    "default": _COMMON,
    "linear": _COMMON | {"factor"},
    "llama3": _COMMON | {"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL},
    "yarn": _COMMON
    | {"factor", _ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
}


def rope_scaling_from_data(fields: Mapping[str, Any] | None) -> RopeScaling | None:
    """Return the scaling from its ``dataclasses.asdict``."""
    return None if fields is None else _CLASSES[fields["rope_type"]](**fields)


def read_rotated_share(config: Fields, default: float) -> float:
    """Return ``partial_rotary_factor``, the share of a head's channels that are rotated. It is a field of the config or
    of a section.

    Raises:
        ValueError: a value is out of its range, or two contradict each other.
    """
    places = [config, *(fields for section in SECTIONS if (fields := config.object(section)) is not None)]
    said = [(f"{f.section}{_SHARE}", f.number(_SHARE, above=0, most=1)) for f in places if _SHARE in f]
    return float(_agreed(said, default, config.where))


def read_rope(config: Fields, *, is_partial: bool = False) -> tuple[float, RopeScaling | None]:
    """Return ``rope_theta`` and the scaling of a config; with ``is_partial``, a ``partial_rotary_factor`` is allowed.

    They come from ``rope_parameters`` (transformers 5), from ``rope_theta`` and ``rope_scaling`` (transformers 4), or
    from both if these agree.

    Raises:
        ValueError: the two contradict each other; the scaling is not supported; or a parameter is missing, out of its
            range or one of another scaling.
    """
    if not is_partial:
        _refuse_partial(config)
    thetas = [(f"{config.section}rope_theta", config.number("rope_theta", above=1))] if "rope_theta" in config else []
    scalings: list[tuple[str, RopeScaling | None]] = []
    for section in SECTIONS:
        fields = config.object(section)
        if fields is None:
            continue
        if not is_partial:
            _refuse_partial(fields)
        # A section without rope_theta uses that of the config, or the default, but never that of the other section.
        theta = fields.number("rope_theta", config.get("rope_theta") or DEFAULT_THETA, above=1)
        thetas.append((f"{section}.rope_theta", theta))
        scalings.append((section, _scaling(fields, config)))
    return _agreed(thetas, DEFAULT_THETA, config.where), _agreed(scalings, None, config.where)


def _agreed(said: list[tuple[str, Any]], default: Any, where: str) -> Any:
    """Return the value on which all places that give one agree; ``default`` if none gives one."""
    for name, value in said[1:]:
        first, expected = said[0]
        if value != expected:
            raise ValueError(
                f"{where}: {first} says {_brief(expected)} and {name} says {_brief(value)}: must be the same; "
                "remove the one that does not describe the weights"
            )
    return said[0][1] if said else default


def _brief(value: float | RopeScaling | None) -> str:
    if value is None:
        return "rope_type='default'"
    return str(value) if isinstance(value, (int, float)) else ", ".join(f"{k}={v!r}" for k, v in vars(value).items())


def _refuse_partial(fields: Fields) -> None:
    if fields.get(_SHARE) is not None and fields.number(_SHARE) != 1:
        fields.refuse(_SHARE, "only 1 is supported")


def _scaling(fields: Fields, config: Fields) -> RopeScaling | None:
    kind = _kind(fields)
    fields.refuse_others(_KNOWN[kind], f"is no parameter of rope_type={kind!r} in transformers")
    if kind == "default":
        return None
    readers: dict[str, Callable[[Fields, Fields], RopeScaling]] = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}
    return readers[kind](fields, config)


def _kind(fields: Fields) -> str:
    names = [name for name in ("rope_type", "type") if name in fields]
    kinds = [fields.get(name) for name in names] or ["default"]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        fields.refuse("rope_type", f"must be the same as type={shown(kinds[1])}")
    if kinds[0] == "dynamic":
        fields.refuse(
            names[0],
            "is not supported: its frequencies depend on the current length of the sequence, so that a server's cached "
            "keys and the trainer's differ; use yarn, which reaches as far",
        )
    if not isinstance(kinds[0], str) or kinds[0] not in _KNOWN:
        fields.refuse(names[0], f"must be 'default' or one of {', '.join(ROPE_SCALINGS)}")
    return str(kinds[0])


def _linear(fields: Fields, config: Fields) -> LinearRopeScaling:
    return LinearRopeScaling(factor=fields.number("factor", least=1, most=_MOST_FACTOR))


def _llama3(fields: Fields, config: Fields) -> Llama3RopeScaling:
    low, high = fields.number("low_freq_factor", above=0), fields.number("high_freq_factor", above=0)
    if high <= low:
        fields.refuse("high_freq_factor", f"must be above low_freq_factor={low:g}")
    return Llama3RopeScaling(
        factor=fields.number("factor", least=1, most=_MOST_FACTOR),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=_original_positions(fields, config),
    )


def _yarn(fields: Fields, config: Fields) -> YarnRopeScaling:
    original = _original_positions(fields, config)
    if "factor" in fields and fields.get("factor") is None:  # transformers' rule
        factor = config.integer("max_position_embeddings") / original
    else:
        factor = fields.number("factor", least=1, most=_MOST_FACTOR)
    fast, slow = (
        _number_or_default(fields, name, default) for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0))
    )
    if fast < slow:
        fields.refuse("beta_fast", f"must be at least beta_slow={slow:g}")
    derived = _attention_factor(fields, factor)
    given = fields.get("attention_factor") is not None
    return YarnRopeScaling(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=fields.number("attention_factor", above=0) if given else derived,
        served_attention_factor=derived,
        beta_fast=fast,
        beta_slow=slow,
        truncate=fields.flag("truncate", True),
        mscale_all_dim=0.0 if fields.get("mscale_all_dim") is None else fields.number("mscale_all_dim", least=0),
    )


def _attention_factor(fields: Fields, factor: float) -> float:
    """Return YaRN's attention factor (equation 22 of arXiv 2309.00071, or the quotient of two such)."""
    mscales = [fields.number(name, least=0) for name in ("mscale", "mscale_all_dim") if fields.get(name) is not None]
    if len(mscales) == 2 and all(mscales):  # transformers ignores a single one, and zeros
        return _of_mscale(factor, mscales[0]) / _of_mscale(factor, mscales[1])
    return _of_mscale(factor, 1.0)


def _of_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _number_or_default(fields: Fields, name: str, default: float) -> float:
    return default if fields.get(name) is None else fields.number(name, above=0)


def _original_positions(fields: Fields, config: Fields) -> int:
    """Return the positions of the pretraining: from the section, else from the config, else all positions."""
    said = [(f.section + _ORIGINAL, f.integer(_ORIGINAL)) for f in (fields, config) if _ORIGINAL in f]
    if said:
        return int(_agreed(said, None, config.where))
    return config.integer("max_position_embeddings")
