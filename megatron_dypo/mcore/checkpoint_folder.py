"""The life of a checkpoint folder: written under another name, published whole, found again, pruned."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
_STEP = re.compile(r"step_(\d{6,})")


def folder_of(root: str | Path, step: int) -> Path:
    """``root/step_000010``"""
    return Path(root) / f"step_{step:06d}"


def step_of(checkpoint: Path) -> int:
    """The step of a folder that :func:`find_latest` found."""
    return int(checkpoint.name.removeprefix("step_"))


def find_latest(root: str | Path) -> Path | None:
    """The newest whole checkpoint under ``root``: the tracker's, or the highest step if the tracker was lost."""
    root = Path(root)
    if (root / TRACKER).is_file():
        tracked = folder_of(root, int((root / TRACKER).read_text()))
        if tracked.is_dir():
            return tracked
    steps = _steps(root)
    return steps[-1] if steps else None


def make_partial(final: Path, parts: Sequence[str]) -> Path:
    """An empty ``<final>.tmp`` with the given sub-folders, to be filled and then published."""
    partial = partial_of(final)
    shutil.rmtree(partial, ignore_errors=True)
    for part in parts:
        (partial / part).mkdir(parents=True)
    return partial


def partial_of(final: Path) -> Path:
    """Where ``final`` is written before it is whole."""
    return final.with_suffix(".tmp")


def publish(final: Path, *, keep: int) -> None:
    """Sync the partial folder to disk, give it its name, move the tracker, then prune.

    Args:
        keep: checkpoints to keep, this one included; 0: all. What a crash left half written goes too.
    """
    root, partial = final.parent, partial_of(final)
    for file in [*partial.rglob("*"), partial]:
        _sync(file)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    new_tracker = root / f"{TRACKER}.tmp"
    new_tracker.write_text(str(step_of(final)))
    _sync(new_tracker)
    new_tracker.replace(root / TRACKER)
    _sync(root)
    others = [folder for folder in _steps(root) if folder != final]
    surplus = others[: max(0, len(others) + 1 - keep)] if keep else []
    for old in [*surplus, *root.glob("step_*.tmp")]:
        shutil.rmtree(old)


def _steps(root: Path) -> list[Path]:
    """Whole checkpoints, by step."""
    found = [folder for folder in root.glob("step_*") if _STEP.fullmatch(folder.name) and folder.is_dir()]
    return sorted(found, key=step_of)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
