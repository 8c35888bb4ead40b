"""Comparison of a run's inputs with those of the checkpoint that it resumes from.

A run that goes on under other inputs is another run, whose curves and books would be those of neither. So a difference
ends the resume, unless ``run.allow_changed`` names its part.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dypo.data.fingerprints import compare_fingerprints

log = logging.getLogger("megatron_dypo")

_WAYS_OUT = "Restore it, choose another run.dir, or set run.allow_changed=[{part}]"
_MEANING = {
    "data": "draws mean other prompts, answers or traces",
    "seed": "other prompts, teachers and rollouts are drawn",
    "tokenizer": "the same text has other tokens",
    "model": "the same weights compute something else",
    "reference": "π_ref is another policy",
    "teacher": "the same rollout has other log-probs of its teacher",
    "verifier": "the same response has another verdict",
    "version": "this program may compute the same step in another way",
}
"""Each part, and what its change means."""
_FILES = ("tokenizer", "reference")
"""Parts whose keys are files, so that a new key is a change. The keys of the others are those of this program."""


def require_same_inputs(
    run_dir: Path, stored: Mapping[str, Any], current: Mapping[str, Any], allow_changed: Sequence[str]
) -> None:
    """Compare the inputs of the run that is resumed with those of this one.

    What an earlier version did not store is not compared, and the log says so.

    Raises:
        ValueError: parts differ that ``allow_changed`` does not name. Each difference is in the message.
    """
    refused, unknown = [], list[str]()
    for part, meaning in _MEANING.items():
        before, now = _keyed(part, stored.get(part)), _keyed(part, current[part])
        if part not in _FILES:
            unknown += [f"{part}: {key}" for key in now if key not in before and (before or part not in stored)]
        if not (found := _differences(part, before, now)):
            continue
        words = f"{part}: {'; '.join(found)}: {meaning}"
        if part in allow_changed:
            log.warning("%s (allowed by run.allow_changed)", words)
        else:
            refused.append(f"{words}. {_WAYS_OUT.format(part=part)}")
    if unknown:
        log.warning(
            "the checkpoint does not say what these inputs were, so they are not compared: %s", "; ".join(unknown)
        )
    if refused:
        raise ValueError(f"{run_dir}: this run has other inputs than the run that is resumed:\n" + "\n".join(refused))


def _keyed(part: str, stored: Any) -> Mapping[str, Any]:
    """Return a part by its keys; {} if the run reads none."""
    if isinstance(stored, str):
        return {"megatron-dypo": stored}  # a part `version` of a program that stored nothing else
    if part == "data" and stored is not None:
        return {key if key == "files" else f"data.{key}": value for key, value in stored.items()}
    return stored or {}


def _differences(part: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    if not before or not now:
        return []  # a reference or a teacher that only one of the two reads
    changes: list[str] = []
    if part == "data":
        changes += compare_fingerprints(before["files"], now["files"])
    keys = dict.fromkeys([*before, *now]) if part in _FILES else [key for key in before if key in now]
    for key in keys:
        if key != "files" and before.get(key) != now.get(key):
            changes.append(f"{key}: {_shown(before.get(key))} → {_shown(now.get(key))}")
    return changes


def _shown(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}…"
