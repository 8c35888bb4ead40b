"""Runs with an exploit in one file of their newest checkpoint, for each of its files."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_dypo.batching.wire import dump_samples
from megatron_dypo.config.reading.load import dump_config
from megatron_dypo.mcore.checkpoints.folder import CHECKPOINTS, TRACKER
from megatron_dypo.mcore.checkpoints.manifest import MANIFEST, list_files, record_files, write_manifest
from tests.support.dist.saved import rank_save
from tests.support.dist.spawn import run_ranks
from tests.support.exploits import hide_in_metadata, hide_in_tensor_files, pickled, saved_by_torch
from tests.support.loop_cases import make_config

OLDER, NEWER = "step_000001", "step_000002"
PARTS = ("mcore", "reference")
READ_IF_THERE = tuple(f"{part}/common.pt" for part in PARTS)
"""Files that core 0.19 does not write, but reads."""


Inside = Literal["all", "metadata", "objects", "tensors"]
"""``all``: the file is nothing else. Else the file is whole, but for one entry, or for the place of such entries."""


@dataclass(frozen=True, kw_only=True)
class HostileRun:
    """A run with an exploit in one file."""

    dir: Path
    """The run folder. Its checkpoints are those of step 1, which is as it was written, and of step 2."""
    name: str
    """The file: of the checkpoint of step 2, or the tracker."""
    inside: Inside
    """What of the file is the exploit."""

    @property
    def root(self) -> Path:
        return self.dir / CHECKPOINTS

    @property
    def checkpoint(self) -> Path:
        return self.root / NEWER


def save_run(model: Path, run: Path) -> Path:
    """Write the checkpoints of the steps 1 and 2 by one rank, with the state of a leader that has no groups."""
    run_ranks(1, rank_save, str(model), str(run / CHECKPOINTS), (1, 2))
    (run / "config.yaml").write_text(dump_config(make_config(run)))
    for step in (OLDER, NEWER):
        replace(run / CHECKPOINTS / step / "leader_00000.bin", dump_samples([]))
        seal(run / CHECKPOINTS / step)
    return run


def replace(path: Path, content: bytes) -> None:
    """Replace a file that may be a link."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def seal(checkpoint: Path) -> None:
    """Write a manifest that matches the files, as whoever changes them can."""
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint, record_files(checkpoint, [name for name in list_files(checkpoint) if name != MANIFEST]))


def hostile_runs(original: Path, folder: Path, marker: Path, *, sealed: bool) -> list[HostileRun]:
    """Return copies of a run, each with another exploit: one in place of every file, and some inside of whole files.

    Args:
        sealed: the manifest matches the changed files, unless it is the hostile file itself.
    """
    made = []
    for number, (name, inside, change) in enumerate(_changes(original / CHECKPOINTS / NEWER, marker)):
        copy = shutil.copytree(original, folder / f"run_{number:02d}", copy_function=os.link)
        run = HostileRun(dir=Path(copy), name=name, inside=inside)
        change(run.root if name == TRACKER else run.checkpoint)
        if sealed and name not in (MANIFEST, TRACKER):
            seal(run.checkpoint)
        made.append(run)
    return made


def _changes(checkpoint: Path, marker: Path) -> Iterator[tuple[str, Inside, Callable[[Path], object]]]:
    """Yield a file, and a function that puts an exploit into it in a copy of the checkpoint's folder."""
    for name in sorted({*list_files(checkpoint), *READ_IF_THERE, TRACKER}):
        for make in (pickled, saved_by_torch):
            yield name, "all", functools.partial(_put, name, make(marker))
    for part in PARTS:
        yield f"{part}/.metadata", "metadata", functools.partial(_hide_in_metadata, part, marker)
        hide = functools.partial(_hide_in_tensor_files, part, marker)
        yield f"{part}/__0_0.distcp", "objects", functools.partial(hide, objects=True)
        yield f"{part}/__0_0.distcp", "tensors", functools.partial(hide, objects=False)


def _put(name: str, content: bytes, folder: Path) -> None:
    replace(folder / name, content)


def _hide_in_metadata(part: str, marker: Path, checkpoint: Path) -> None:
    hide_in_metadata(checkpoint / part / ".metadata", marker)


def _hide_in_tensor_files(part: str, marker: Path, checkpoint: Path, *, objects: bool) -> None:
    hide_in_tensor_files(checkpoint / part, marker, objects=objects)
