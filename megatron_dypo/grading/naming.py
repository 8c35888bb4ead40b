"""The verifier of each row, and the import path of its function."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from megatron_dypo.config.grading import BUILT_IN_VERIFIERS, GradingConfig
from megatron_dypo.grading.answers.style import AnswerStyle

_BUILT_IN_PATHS = {
    "math": "megatron_dypo.grading.math:verify_math",
    "exact": "megatron_dypo.grading.exact:verify_exact",
    "choice": "megatron_dypo.grading.choice:verify_choice",
}
assert set(_BUILT_IN_PATHS) == set(BUILT_IN_VERIFIERS)


def verifier_of(cfg: GradingConfig, *, own: str | None, source: str) -> str:
    """Return the verifier of a row: its ``own``, else that of its ``source``, else ``grading.verifier``.

    Raises ValueError if the row names one that it may not (:func:`row_verifier_problem`).
    """
    if own is None:
        return cfg.by_source.get(source, cfg.verifier)
    if problem := row_verifier_problem(cfg, own):
        raise ValueError(problem)
    return own


def row_verifier_problem(cfg: GradingConfig, name: str) -> str | None:
    """Return why a row may not name this verifier; None if it may.

    A row may name a built-in verifier and any that the config names: a data file alone must not decide which code runs.
    """
    allowed = dict.fromkeys([*BUILT_IN_VERIFIERS, *(verifier for _, verifier in cfg.named_verifiers())])
    if name in allowed:
        return None
    return (
        f"verifier={name!r}: a row may name {', '.join(allowed)}; "
        "add others to grading.row_verifiers, so that the config says which code runs"
    )


def unused_sources(cfg: GradingConfig, sources: Collection[str]) -> list[str]:
    """Return the sources of ``grading.by_source`` that no row has, each as a line that names the data's sources."""
    known = ", ".join(sorted(sources)) or "none"
    return [
        f"grading.by_source.{source}: no row has this source; the data's sources are {known}"
        for source in cfg.by_source
        if source not in sources
    ]


def import_path(name: str) -> str:
    """Return the ``pkg.module:function`` of a verifier's name."""
    return _BUILT_IN_PATHS.get(name, name)


def options_of(cfg: GradingConfig, name: str) -> dict[str, Any]:
    """Return the keyword arguments that a verifier gets with every pair: the answer style for built-in verifiers."""
    if name not in BUILT_IN_VERIFIERS:
        return {}
    return {"style": AnswerStyle(answer_format=cfg.answer_format, thinking=cfg.thinking)}


def keys_that_name(cfg: GradingConfig, name: str) -> str:
    """Return the keys that name this verifier, for an error message: ``grading.verifier='a.b:c'``."""
    keys = [f"grading.{key}" for key, verifier in cfg.named_verifiers() if verifier == name]
    return f"{', '.join(keys) or 'the verifier that rows name'}={name!r}"
