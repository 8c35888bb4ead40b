"""Published settings of methods by name. ``objective.preset`` takes from here the keys that a config leaves out.

A preset holds the objective alone. Learning rates, batches and lengths of the publications are in docs/rivals.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CLIPPED = {"clip_low": 0.2, "clip_high": 0.2, "normalize_std": True}
_DR_GRPO = {"normalize_std": False, "length_normalization": "constant", "constant_length": 8192}
_CLIPPED_DR_GRPO = {**_DR_GRPO, "clip_low": 0.2, "clip_high": 0.2}
_UNCLIPPED_DR_GRPO = {**_DR_GRPO, "clip_low": None, "clip_high": None}
_TOKEN_MEANS = {"length_normalization": "token_mean", "trace_normalization": "token_mean"}
_PREFIXES = {"low": {"start": 0.95, "end": 0.05, "steps": 500, "shape": "cosine"}, "high": 0.95, "keep": 0.2}
_MICROBATCH_RATIO = 0.1
"""Weight of a supervised term in forks of verl that add the token means of M microbatches to a sum over S = 64
sequences: M/S, with 6 or 7 microbatches. M depends on packing and is published nowhere (docs/rivals.md)."""

PRESETS: dict[str, dict[str, Any]] = {
    "sft_luffy_paper": {"name": "sft", "length_normalization": "token_mean"},
    "dr_grpo_luffy_paper": {"name": "grpo", **_CLIPPED_DR_GRPO, "entropy_coef": 0.01},
    "dr_grpo_luffy_code": {"name": "grpo", **_CLIPPED_DR_GRPO, "entropy_coef": 0.001},
    "sft_then_rl_luffy_paper": {"name": "sft_then_rl", **_CLIPPED_DR_GRPO, "entropy_coef": 0.01},
    "fixed_chord_paper": {"name": "fixed", **_CLIPPED, **_TOKEN_MEANS, "options": {"trace_weight": 0.1}},
    "rl_with_sft_loss_luffy_code": {
        "name": "fixed",
        **_UNCLIPPED_DR_GRPO,
        "trace_normalization": "token_mean",
        "entropy_coef": 0.001,
        "options": {"trace_weight": _MICROBATCH_RATIO / (1 + _MICROBATCH_RATIO), "trace_takes_a_place": True},
    },
    "superrl_paper": {"name": "superrl", **_CLIPPED, "options": {"gate": "reward"}},
    "superrl_a_paper": {"name": "superrl", **_CLIPPED, "options": {"gate": "advantage"}},
    "luffy_paper": {"name": "luffy", **_UNCLIPPED_DR_GRPO, "entropy_coef": 0.01, "options": {"shape_gamma": 0.1}},
    "luffy_code": {"name": "luffy", **_UNCLIPPED_DR_GRPO, "entropy_coef": 0.001, "options": {"shape_gamma": 0.1}},
    "luffy_equations": {
        "name": "luffy",
        **_CLIPPED,
        "length_normalization": "group_mean",
        "options": {"shape_gamma": 0.1},
    },
    "srft_paper": {"name": "srft", "normalize_std": True, "length_normalization": "sum"},
    "srft_hpt_code": {
        "name": "srft",
        **_UNCLIPPED_DR_GRPO,
        "trace_normalization": "token_mean",
        "options": {"variant": "hpt_code", "trace_weight": 0.5 * _MICROBATCH_RATIO},
    },
    "chord_mu_paper": {
        "name": "chord",
        **_CLIPPED,
        "options": {"mu": {"start": 0.9, "end": 0.05, "steps": 200, "shape": "cosine"}, "phi": False},
    },
    "chord_phi_paper": {"name": "chord", **_CLIPPED, "options": {"mu": 0.1, "phi": True}},
    "chord_code": {
        "name": "chord",
        **_CLIPPED,
        "dual_clip": 3.0,
        "options": {"mu": {"start": 0.5, "end": 0.02, "steps": 400, "shape": "cosine", "warmup": 200}, "phi": True},
    },
    "hpt_paper": {
        "name": "hpt",
        **_CLIPPED,
        "length_normalization": "sum",
        "trace_normalization": "sequence_mean",
        "options": {"gate": 0.0},
    },
    "hpt_llama_paper": {
        "name": "hpt",
        **_CLIPPED,
        "length_normalization": "sum",
        "trace_normalization": "sequence_mean",
        "options": {"gate": 0.25},
    },
    "hpt_code": {
        "name": "hpt",
        **_UNCLIPPED_DR_GRPO,
        "trace_normalization": "token_mean",
        "gamma": _MICROBATCH_RATIO,
        "entropy_coef": 0.001,
        "options": {"gate": 0.0},
    },
    "relift_paper": {
        "name": "relift",
        **_CLIPPED,
        "length_normalization": "group_mean",
        "trace_normalization": "sequence_mean",
        "options": {"buffer_size": 128, "buffer_entropy_coef": 1e-4},
    },
    "relift_code": {
        "name": "relift",
        **_UNCLIPPED_DR_GRPO,
        "trace_normalization": "token_mean",
        "entropy_coef": 0.001,
        "options": {"buffer_size": 128, "buffer_entropy_coef": 1e-3},
    },
    "prefix_rft_paper": {"name": "prefix_rft", **_CLIPPED_DR_GRPO, "options": _PREFIXES},
    "prefix_rft_code": {
        "name": "prefix_rft",
        **_CLIPPED_DR_GRPO,
        "dual_clip": 3.0,
        "entropy_coef": 0.001,
        "options": _PREFIXES,
    },
    "trapo_paper": {"name": "trapo", **_CLIPPED, "options": {"guides": "paper", "alpha": 0.1}},
    "trapo_code": {
        "name": "trapo",
        **_UNCLIPPED_DR_GRPO,
        "entropy_coef": 0.001,
        "options": {"guides": "code", "alpha": 0.1},
    },
}
"""Name → keys of ``objective``. ``paper``: as printed; ``code``: as its authors run it; see docs/rivals.md."""


def with_preset(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config's mapping, completed by the keys of its ``objective.preset``."""
    section = tree.get("objective")
    name = section.get("preset") if isinstance(section, Mapping) else None
    if not isinstance(section, Mapping) or not isinstance(name, str) or name not in PRESETS:
        return dict(tree)  # a name that does not exist is refused with the rest of the section
    return {**tree, "objective": _over(PRESETS[name], section)}


def _over(given: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``given`` updated by ``own``; their ``options`` are merged in the same way."""
    merged = {**given, **own}
    if isinstance(given.get("options"), Mapping) and isinstance(own.get("options"), Mapping):
        merged["options"] = {**given["options"], **own["options"]}
    return merged
