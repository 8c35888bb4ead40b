"""The run folder: whether the run can write to it, and whether its disk has room for the run's files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_dypo.check.model_size import num_parameters
from megatron_dypo.config.tree import Config
from megatron_dypo.metrics.findings import Findings
from megatron_dypo.models.architecture import Architecture

_GIB = 2**30
_MOMENTS = 8
"""Bytes of Adam's two fp32 moments."""
_MAIN = 4
"""Bytes of an fp32 main weight beside a bf16 one."""


def check_run_folder(config: Config, arch: Architecture | None, found: Findings) -> None:
    """Check that ``run.dir`` is, or can become, a folder that this user may write to; note a disk that is too small."""
    folder = Path(config.run.dir).absolute()
    key = f"run.dir={config.run.dir!r}"
    try:
        parent = _nearest(folder)
        if not parent.is_dir():
            found.problems.append(f"{key}: {parent} is a file, and must be a folder")
            return
        if not os.access(parent, os.W_OK | os.X_OK):
            found.problems.append(f"{key}: no permission to write in {parent}")
            return
        free = shutil.disk_usage(parent).free + _held(folder / "checkpoints")
    except OSError as error:
        found.problems.append(f"{key}: cannot be used: {error.strerror or error}")
        return
    if not config.run.resume and any((folder / "checkpoints").glob("step_*")):
        found.notes.append(
            f"run.resume=false: {folder / 'checkpoints'} has checkpoints: choose another run.dir or resume"
        )
    count = num_parameters(config.model, arch) if arch is not None else None
    if count is None:
        return
    needed, words = room_needed(config, count)
    if needed > free:
        found.notes.append(
            f"{key}: {free / _GIB:,.1f} GiB are free on its disk, and the run needs about {needed / _GIB:,.1f} GiB: "
            f"{words}"
        )


def room_needed(config: Config, count: int) -> tuple[float, str]:
    """Return the most bytes that checkpoints and HF export of a run of ``count`` parameters take, and a description.

    A checkpoint holds each parameter, Adam's moments and, in bf16, the main weight. While one is written, there is one
    more than ``checkpoint.keep``, ``keep_every`` and ``keep_best`` keep.
    """
    size = config.model.element_size
    each = count * (size + _MOMENTS + (_MAIN if size < _MAIN else 0))
    if config.objective.reference.mode == "refreshed":
        each += count * size
    every, cfg = config.checkpoint.every, config.checkpoint
    written = 1 if every == 0 else -(-config.run.steps // every)
    more = (config.run.steps // cfg.keep_every if cfg.keep_every else 0) + (cfg.keep_best.metric is not None)
    kept = min(written, cfg.keep + 1 + more) if cfg.keep else written
    exported = count * size if config.export.hf else 0
    words = f"{kept} checkpoint{'s' if kept > 1 else ''} of {each / _GIB:,.1f} GiB"
    return kept * each + exported, words + (f" and hf/ of {exported / _GIB:,.1f} GiB" if exported else "")


def _nearest(folder: Path) -> Path:
    """Return the folder itself, or the nearest one above it that exists."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def _held(checkpoints: Path) -> int:
    """Return the bytes of the existing checkpoints, which the estimate also includes."""
    if not checkpoints.is_dir():
        return 0
    return sum(path.stat().st_size for path in checkpoints.rglob("*") if path.is_file())
