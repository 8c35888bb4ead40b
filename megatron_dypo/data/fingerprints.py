"""Comparison of prompt files with the fingerprints in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_dypo.config.words import counted


def compare_fingerprints(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one line for each difference between two results of ``PromptDataset.fingerprint()``; [] if they are equal.

    If they differ, positions in the stream of prompts mean other rows.
    """
    old_names, new_names = [file["name"] for file in old], [file["name"] for file in new]
    if old_names != new_names:
        if sorted(old_names) == sorted(new_names):
            return [f"data.prompts: the files were {', '.join(old_names)}, in this order; now {', '.join(new_names)}"]
        gone = [f"{name} is gone" for name in old_names if name not in new_names]
        came = [f"{name} is new" for name in new_names if name not in old_names]
        return [f"data.prompts: {difference}" for difference in (*gone, *came)] or [
            f"data.prompts: {counted(len(old_names), 'file')} before, {len(new_names)} now"
        ]
    return [line for before, after in zip(old, new, strict=True) for line in _differences(before, after)]


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    lines = []
    if old["rows"] != new["rows"]:
        lines.append(f"{new['name']}: had {counted(old['rows'], 'row')}, has {new['rows']}")
    elif old["sha256"] != new["sha256"]:
        lines.append(f"{new['name']}: has the same number of rows ({new['rows']}) with another content")
    if old["skipped"] != new["skipped"]:
        lines.append(f"{new['name']}: {counted(old['skipped'], 'bad row')} skipped before, {new['skipped']} now")
    elif old["sha256"] == new["sha256"] and old["skipped_sha256"] != new["skipped_sha256"]:
        lines.append(f"{new['name']}: other rows are bad and skipped than before")
    return lines
