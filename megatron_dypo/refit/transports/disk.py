"""The disk transport: trainer ranks write an HF folder, which every server then loads.

The leader of each pipeline stage, and each other rank that owns experts, writes its part.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_dypo.fs import commit_folder, partial_path, start_folder
from megatron_dypo.metrics.progress import progress
from megatron_dypo.models.gather import exhausted, part_name
from megatron_dypo.models.hf.write import finish_hf_folder, write_parts
from megatron_dypo.refit.control import SGLangControl
from megatron_dypo.refit.deadline import Deadline
from megatron_dypo.refit.source import Source
from megatron_dypo.refit.transports.base import Connection, Step


class DiskConnection(Connection):
    """Writes ``<folder>/version_<N>``, and removes the folders of other versions once N is served.

    Trainer ranks and servers must see the folder under the same path. Nothing stays open between refits.
    """

    def __init__(self, source: Source, control: SGLangControl | None, folder: Path, reference: Path) -> None:
        """``control`` is None except on the global leader; ``reference`` is an HF folder with ``config.json``."""
        self._source = source
        self._control = control
        self._folder = folder.resolve()
        self._reference = reference

    def steps(self, version: int, deadline: Deadline) -> Iterator[Step]:
        path, control = self._folder / f"version_{version}", self._control
        sends = self._source.layout.is_sender
        yield functools.partial(self._start, path) if control else None
        yield functools.partial(self._write, partial_path(path)) if sends else None
        yield functools.partial(self._load, control, path, deadline) if control else None

    def abort(self) -> None:
        """Do nothing: the next refit starts with an empty folder."""

    def close(self) -> None:
        """Do nothing: the last folder stays, since the servers name it as their model."""

    def _start(self, path: Path) -> None:
        for left_over in self._folder.glob(".version_*"):
            shutil.rmtree(left_over)
        start_folder(path)

    def _write(self, folder: Path) -> int:
        """Write this rank's tensors; return the bytes written. All ranks that send call it."""
        specs = self._source.specs()
        num_bytes = sum(spec.num_bytes for spec in specs)
        with (
            exhausted(self._source.tensors()) as tensors,
            progress(num_bytes, "refit", "B", enabled=False) as bar,
        ):
            write_parts(folder, part_name(self._source.layout), specs, tensors, bar)
        return num_bytes

    def _load(self, control: SGLangControl, path: Path, deadline: Deadline) -> None:
        """Finish the folder, and make the servers load it."""
        finish_hf_folder(partial_path(path), self._reference)
        commit_folder(partial_path(path), path)
        control.update_from_disk(str(path), deadline)
        for other in self._folder.glob("version_*"):
            if other != path:
                shutil.rmtree(other)
