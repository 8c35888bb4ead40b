"""The life of a checkpoint folder: it is written under another name, published whole, found again, and removed."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_dypo.fs import commit_folder, remove, replace_file, sync
from megatron_dypo.json_text import parse_json

CHECKPOINTS = "checkpoints"
"""Folder of a run that holds its checkpoints."""
STATE = "trainer_state.json"
TRACKER = "latest_checkpointed_iteration.txt"
_PUBLISHING = ".publishing.json"
"""The tracker's text from before, and the step that it is about to name, while :func:`publish` runs."""
DAMAGED = ".damaged"
"""Suffix of a checkpoint that was set aside."""
DELETED = ".deleted"
"""Suffix of a checkpoint while it is removed."""
_REPLACED = ".replaced"
"""Suffix of a checkpoint of the same step while :func:`megatron_dypo.fs.commit_folder` replaces it."""
_REMAINS = ("step_*.tmp", f"step_*{DELETED}", f".step_*{_REPLACED}")
log = logging.getLogger(__name__)

_STEP = re.compile(r"step_(\d{6,})")


def checkpoints_of(run_dir: Path) -> Path:
    """Return the folder of a run's checkpoints. Raises ValueError if ``run_dir`` has none."""
    root = run_dir / CHECKPOINTS
    if not root.is_dir():
        raise ValueError(f"{run_dir}: no folder {CHECKPOINTS} there; a run folder of `megatron-dypo train` is needed")
    return root


def folder_of(root: str | Path, step: int) -> Path:
    """Return the folder of a step: ``root/step_000010``."""
    return Path(root) / f"step_{step:06d}"


def step_of(checkpoint: Path) -> int:
    """Return the step of a folder that :func:`find_latest` found."""
    return int(checkpoint.name.removeprefix("step_"))


def find_latest(root: str | Path) -> Path | None:
    """Return the newest whole checkpoint under ``root``: the tracker's, or the highest step if the tracker was lost.

    A tracker counts as lost if it is empty, holds no step or names a folder that is not whole; a crash can leave such a
    tracker. A folder is whole if its ``trainer_state.json``, which is written after the weights, can be read. A line
    tells if the tracker names an older folder than the newest.
    """
    root = Path(root)
    steps = whole_folders(root)
    tracked = _tracked(root)
    if tracked in steps:
        _tell_of_newer(tracked, steps[-1])
        return tracked
    if tracked is not None and steps:
        log.warning("%s: names no whole checkpoint; taking %s", root / TRACKER, steps[-1])
    return steps[-1] if steps else None


def candidates(root: str | Path) -> list[Path]:
    """Return the folders that may be the checkpoint to resume from, best first; whether they are whole is not known.

    The tracker's is first, then older ones; a line tells if there is a newer one. Without a usable tracker all count,
    the newest first.
    """
    root = Path(root)
    found = sorted(filter(Path.is_dir, _named(root)), key=step_of, reverse=True)
    tracked = _tracked(root)
    if tracked in found:
        _tell_of_newer(tracked, found[0])
        return found[found.index(tracked) :]
    if tracked is not None and found:
        log.warning("%s: names no checkpoint; beginning with %s", root / TRACKER, found[0])
    return found


def set_aside(damaged: Path) -> Path:
    """Rename a damaged checkpoint to ``step_<step>.damaged``, so that it is neither counted nor overwritten or removed.

    Return its new path.
    """
    number, path = 1, damaged.with_suffix(DAMAGED)
    while os.path.lexists(path):
        number += 1
        path = damaged.with_suffix(f"{DAMAGED}-{number}")
    damaged.rename(path)
    sync(damaged.parent)
    return path


def track(checkpoint: Path) -> None:
    """Point the tracker at a checkpoint."""
    replace_file(checkpoint.parent / TRACKER, str(step_of(checkpoint)))


def _tracker_text(root: Path) -> str | None:
    """Return what the tracker says; None without a tracker."""
    path = root / TRACKER
    return path.read_bytes().strip(b" \t\r\n\0").decode("ascii", errors="replace") if path.is_file() else None


def _tracked(root: Path) -> Path | None:
    """Return the folder that the tracker names; None without a tracker."""
    text = _tracker_text(root)
    if text is None:
        return None
    return folder_of(root, int(text)) if re.fullmatch(r"[0-9]{1,18}", text) else root / TRACKER


def _tell_of_newer(tracked: Path, newest: Path) -> None:
    """Say loudly that the tracker names an older checkpoint than the newest.

    A user may have set it back, so it is obeyed. It has no checksum: a flipped bit makes 100 of 300.
    """
    if tracked != newest:
        log.warning(
            "OLDER CHECKPOINT: %s names %s, and %s is newer: taking %s, as a tracker that was set back asks for; if "
            "nobody set it back, write %d into it",
            tracked.parent / TRACKER,
            tracked.name,
            newest.name,
            tracked.name,
            step_of(newest),
        )


def mend_interrupted(root: str | Path) -> None:
    """Finish the interrupted publication of a checkpoint, and remove the remains of interrupted saves.

    The caller must hold the run's lock, so that no save is running. What cannot be removed is named, and stays.
    """
    _finish_publishing(Path(root))
    for partial in remains(root):
        final = partial.with_name(partial.stem.removeprefix("."))
        if partial.suffix == _REPLACED and not os.path.lexists(final):
            log.warning("restoring %s, which an interrupted save was about to replace", final)
            partial.rename(final)
        else:
            log.warning("removing %s, the remains of an interrupted save", partial)
            try_to_remove(partial)


def _finish_publishing(root: Path) -> None:
    """Move the tracker to a checkpoint that got its name just before its save was interrupted.

    A tracker that was written since, as by a user, is left as it is.
    """
    path = root / _PUBLISHING
    if not path.is_file():
        return
    with contextlib.suppress(ValueError, TypeError, KeyError):
        begun = parse_json(path.read_bytes())
        final = folder_of(root, begun["step"])
        has_name = final.is_dir() and not os.path.lexists(partial_of(final))
        if has_name and begun["tracker"] == _tracker_text(root) != str(step_of(final)):
            log.warning("%s got its name just before its save was interrupted: it is the newest checkpoint", final)
            track(final)
    remove(path)


def try_to_remove(path: Path, how: Callable[[Path], None] = remove) -> None:
    """Remove what nothing depends on. A line tells if it stays, as while somebody else reads it on NFS."""
    try:
        how(path)
    except OSError as error:
        log.warning("%s cannot be removed, and stays: %s", path, error)


def make_partial(final: Path, parts: Sequence[str]) -> Path:
    """Make an empty ``<final>.tmp`` with the given sub-folders, to be filled and then published; return it."""
    partial = partial_of(final)
    remove(partial)
    for part in parts:
        (partial / part).mkdir(parents=True)
    return partial


def partial_of(final: Path) -> Path:
    """Return the folder that ``final`` is written into before it is whole."""
    return final.with_suffix(".tmp")


def discard_partial(final: Path) -> None:
    """Remove the files of a failed save, so that the disk has room again."""
    remove(partial_of(final))


def publish(final: Path) -> None:
    """Sync the partial folder to disk, give it its name, and move the tracker.

    Both or neither are done after a crash, once :func:`mend_interrupted` has run.
    """
    begun = final.parent / _PUBLISHING
    replace_file(begun, json.dumps({"step": step_of(final), "tracker": _tracker_text(final.parent)}))
    commit_folder(partial_of(final), final)
    track(final)
    remove(begun)


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint. It loses its name first, so that a half-removed folder never looks like a checkpoint."""
    doomed = checkpoint.with_suffix(DELETED)
    remove(doomed)
    checkpoint.rename(doomed)
    sync(doomed.parent)
    remove(doomed)


def remains(root: str | Path) -> list[Path]:
    """Return what interrupted saves and removals left behind."""
    return [path for pattern in _REMAINS for path in Path(root).glob(pattern)]


def whole_folders(root: Path) -> list[Path]:
    """List the folders whose state can be read, by step. Their other files may be damaged."""
    return sorted(filter(_is_whole, _named(root)), key=step_of)


def _named(root: Path) -> list[Path]:
    return [path for path in root.glob("step_*") if _STEP.fullmatch(path.name)]


def _is_whole(folder: Path) -> bool:
    try:
        return isinstance(parse_json((folder / STATE).read_bytes()), dict)
    except (OSError, ValueError):
        return False
