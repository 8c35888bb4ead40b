"""Weights through a shared folder: every stage's leader (and owner of experts) writes its HF safetensors, then every server loads the folder."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

from megatron_dypo.metrics.progress import progress
from megatron_dypo.models.gather import part_name
from megatron_dypo.models.hf.folders import commit_folder, partial_path, start_folder
from megatron_dypo.models.hf.write import finish_hf_folder, write_parts
from megatron_dypo.refit.control import SGLangControl
from megatron_dypo.refit.deadline import Deadline
from megatron_dypo.refit.transports.base import Lockstep, Source, Transport


class DiskTransport(Transport):
    """Writes ``<folder>/version_<N>`` and removes the folders of other versions once N is served.

    Trainer ranks and servers must see the folder under the same path. ``control`` is None but on the global leader,
    whose ``reference`` folder gives ``config.json``.
    """

    in_session = False

    def __init__(
        self, source: Source, control: SGLangControl | None, lockstep: Lockstep, folder: Path, reference: Path
    ) -> None:
        self._source = source
        self._control = control
        self._lockstep = lockstep
        self._folder = folder.resolve()
        self._reference = reference

    def send(self, version: int, deadline: Deadline) -> int:
        path = self._folder / f"version_{version}"
        leads, sends = self._source.layout.is_global_leader, self._source.layout.is_sender
        self._lockstep.run(functools.partial(self._start, path) if leads else None)
        num_bytes = self._lockstep.run(functools.partial(self._write, partial_path(path)) if sends else None)
        self._lockstep.run(functools.partial(self._serve, path, deadline) if leads else None)
        return num_bytes or 0

    def reset(self) -> None:
        """There is no connection to forget; the next refit begins with an empty folder."""

    def close(self) -> None:
        """Nothing to leave: the servers name the last folder as their model, so it stays."""

    def _start(self, path: Path) -> None:
        for left_over in self._folder.glob(".version_*"):
            shutil.rmtree(left_over)
        start_folder(path)

    def _write(self, folder: Path) -> int:
        """Write what leaves this rank; returns the bytes written. Runs on all ranks that send."""
        specs = self._source.specs()
        num_bytes = sum(spec.num_bytes for spec in specs)
        tensors = self._source.tensors()
        try:
            with progress(num_bytes, "refit", "B", enabled=False) as bar:
                write_parts(folder, part_name(self._source.layout), specs, tensors, bar)
        finally:
            # Other tensor-parallel ranks only take part in the gathers; after an error the leader does so too.
            for _ in tensors:
                pass
        return num_bytes

    def _serve(self, path: Path, deadline: Deadline) -> None:
        assert self._control is not None
        finish_hf_folder(partial_path(path), self._reference)
        commit_folder(partial_path(path), path)
        self._control.update_from_disk(str(path), deadline)
        for other in self._folder.glob("version_*"):
            if other != path:
                shutil.rmtree(other)
