"""Everything beside the checkpoint that decides the steps of a run, as it is stored and compared at a resume.

A run that goes on under other inputs is another run, whose curves and books would be those of neither. So a difference
ends the resume, unless ``run.allow_changed`` names its part. The other settings of the config may change: the log shows
each change.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dypo import __version__
from megatron_dypo.config.grading import GradingConfig
from megatron_dypo.config.tree import Config
from megatron_dypo.data.fingerprints import compare_fingerprints
from megatron_dypo.data.prompts import PromptStream
from megatron_dypo.data.row_check.cache import tokenizer_files
from megatron_dypo.data.tokenizer.open import Tokenizer
from megatron_dypo.loop.setup.teachers import files_of_verifiers
from megatron_dypo.models.architecture import Architecture

log = logging.getLogger("megatron_dypo")

Inputs = dict[str, Any]
"""Part → its description in JSON values; see :func:`describe_inputs`."""

_WAYS_OUT = "Restore it, choose another run.dir, or set run.allow_changed=[{part}]"
_SPEED_OF_GRADING = ("workers", "deadline_s", "batch_size")
"""Keys of ``grading`` that decide no verdict."""
_MEANING = {
    "data": "the positions in the data mean other rows",
    "seed": "other prompts, teachers and rollouts are drawn",
    "tokenizer": "the same text has other tokens",
    "model": "the same weights compute something else",
    "reference": "π_ref is another policy",
    "verifier": "the same response has another verdict",
    "version": "this program may compute the same step in another way",
}
"""Each part, and what its change means."""


def describe_inputs(
    config: Config,
    *,
    stream: PromptStream,
    tokenizer: Tokenizer,
    arch: Architecture,
    reference: Mapping[str, str] | None,
) -> Inputs:
    """Return the parts ``data``, ``seed``, ``tokenizer``, ``model``, ``reference``, ``verifier`` and ``version``.

    Args:
        reference: file → SHA-256 of a frozen π_ref; None if the run reads none.
    """
    return _plain(
        {
            "data": {"files": stream.fingerprint(), "shuffle": config.data.shuffle},
            "seed": {"run.seed": config.run.seed},
            "tokenizer": {
                **tokenizer_files(tokenizer),
                "ids that end a response": list(tokenizer.eos_ids),
                "data.chat_template": config.data.chat_template,
                "data.chat_template_args": dict(config.data.chat_template_args),
            },
            "model": dataclasses.asdict(arch),
            "reference": None if reference is None else dict(reference),
            "verifier": {**_grading(config.grading), **files_of_verifiers(config.grading)},
            "version": __version__,
        }
    )


def require_same_inputs(
    run_dir: Path, stored: Mapping[str, Any], current: Mapping[str, Any], allow_changed: Sequence[str]
) -> None:
    """Compare the inputs of the run that is resumed with those of this one.

    Raises:
        ValueError: parts differ that ``allow_changed`` does not name. Each difference is in the message.
    """
    refused = []
    for part, meaning in _MEANING.items():
        found = _differences(part, stored[part], current[part])
        if not found:
            continue
        words = f"{part}: {'; '.join(found)}: {meaning}"
        if part in allow_changed:
            log.warning("%s (allowed by run.allow_changed)", words)
        else:
            refused.append(f"{words}. {_WAYS_OUT.format(part=part)}")
    if refused:
        raise ValueError(f"{run_dir}: this run has other inputs than the run that is resumed:\n" + "\n".join(refused))


def _differences(part: str, stored: Any, current: Any) -> list[str]:
    if stored is None or current is None:
        return []  # a reference that only one of the two reads
    if part == "version":
        return [] if stored == current else [f"{stored} → {current}"]
    changes: list[str] = []
    if part == "data":
        changes += compare_fingerprints(stored["files"], current["files"])
    for key in dict.fromkeys([*stored, *current]):
        before, now = stored.get(key), current.get(key)
        if before == now or (part == "data" and key == "files"):
            continue
        changes.append(f"{key}: {_shown(before)} → {_shown(now)}")
    return changes


def _shown(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _grading(cfg: GradingConfig) -> dict[str, Any]:
    return {f"grading.{k}": v for k, v in dataclasses.asdict(cfg).items() if k not in _SPEED_OF_GRADING}


def _plain(content: Inputs) -> Inputs:
    """Return the content as it is after a round trip through JSON, so that a stored one compares equal."""
    plain: Inputs = json.loads(json.dumps(content))
    return plain
