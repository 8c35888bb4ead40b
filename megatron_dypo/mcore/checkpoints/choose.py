"""The choice of the checkpoint that a run resumes from: the newest one that is whole."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from megatron_dypo.mcore.checkpoints.folder import set_aside, track
from megatron_dypo.mcore.checkpoints.manifest import MANIFEST
from megatron_dypo.mcore.checkpoints.verify import Readers, Verify, find_damage

log = logging.getLogger(__name__)


def newest_whole(checkpoints: Sequence[Path], verify: Verify, readers: Readers) -> Path | None:
    """Return the first whole one of ``checkpoints``, None if there are none. Collective over ``readers``.

    The caller must hold the run's lock: damaged checkpoints before it are renamed to ``step_<step>.damaged``, and the
    tracker is set. A line for each names the damaged file and the reason.

    Raises:
        ValueError: there are checkpoints, and none is whole. Nothing is renamed.
    """
    damaged: dict[Path, str] = {}
    for checkpoint in checkpoints:
        damage = find_damage(checkpoint, verify, readers, show_progress=True)
        if damage is None:
            if damaged:
                _take_older(checkpoint, damaged, readers)
            if readers.is_first and not (checkpoint / MANIFEST).is_file():
                log.warning(
                    "%s: an earlier version wrote it, without %s: its files are not verified", checkpoint, MANIFEST
                )
            return checkpoint
        damaged[checkpoint] = damage
    if damaged:
        reasons = "; ".join(f"{path.name}/{damage}" for path, damage in list(damaged.items())[:3])
        raise ValueError(
            f"{checkpoints[0].parent}: none of {len(damaged)} checkpoints is whole: {reasons}: restore one, or move "
            "the folder away to start anew"
        )
    return None


def _take_older(checkpoint: Path, damaged: dict[Path, str], readers: Readers) -> None:
    if readers.is_first:
        for path, damage in damaged.items():
            kept = set_aside(path)
            log.error("DAMAGED CHECKPOINT: %s/%s: set aside as %s, taking an older one", path, damage, kept.name)
        track(checkpoint)
    readers.gather(None)  # nobody goes on before the folders have their names
