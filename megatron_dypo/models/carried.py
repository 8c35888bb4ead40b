"""Tensors of an HF folder that are not trained, and are carried to the folders that are made of it, bit for bit: those
of layers that predict further tokens (``num_nextn_predict_layers``).

A converted checkpoint keeps them in files of its own. A checkpoint of a run keeps the name of the folder that has them,
since they may be larger than all that a step writes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_dypo.fs import durable_file
from megatron_dypo.metrics.progress import progress
from megatron_dypo.models.architecture import FAMILIES, Architecture, load_architecture
from megatron_dypo.models.families.registry import is_carried_hf_name
from megatron_dypo.models.hf.files import INDEX_NAME, SINGLE_NAME, SafetensorsFiles
from megatron_dypo.models.hf.json_file import read_json_object
from megatron_dypo.models.hf.read import DTYPES
from megatron_dypo.models.hf.write import MAX_FILE_BYTES, TensorSpec, plan_files, write_parts

_STEM = "mtp"
_FOLDER = "mtp"
"""Folder in that of a converted checkpoint's configuration: an HF folder of the carried tensors alone."""
_POINTER = "mtp.json"
"""File in the folder of a run's checkpoint: the HF folder that has the carried tensors."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Carried:
    """The carried tensors of an HF folder; none for most models."""

    specs: tuple[TensorSpec, ...] = ()
    slices: Mapping[str, Any] | None = None

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.specs)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names and tensors, one at a time."""
        for spec in self.specs:
            assert self.slices is not None
            yield spec.name, self.slices[spec.name][:]


def find_carried(folder: Path, arch: Architecture) -> Carried:
    """Return the carried tensors of an HF folder, or of the folder of configuration in a checkpoint.

    A model without weights there has none, and a line says that its files promise some.

    Raises:
        ValueError: the folder that a run's checkpoint names is not there, or a file is damaged.
    """
    if not arch.num_mtp_layers:
        return Carried()
    source = _source(folder)
    has_weights = (source / INDEX_NAME).is_file() or (source / SINGLE_NAME).is_file()
    files = SafetensorsFiles(source) if has_weights else None
    names = [name for name in files.file_of if is_carried_hf_name(name, arch)] if files else []
    if files is None or not names:
        _log.warning("%s: num_nextn_predict_layers=%d, but no such tensor is there", folder, arch.num_mtp_layers)
        return Carried()
    slices = {name: files.slice(name) for name in names}
    specs = []
    for name, view in slices.items():
        if view.get_dtype() not in DTYPES:
            raise ValueError(f"{source}: tensor {name} has type {view.get_dtype()}: must be one of {', '.join(DTYPES)}")
        specs.append(TensorSpec(name, DTYPES[view.get_dtype()], tuple(view.get_shape())))
    return Carried(specs=tuple(specs), slices=slices)


def write_carried(folder: Path, carried: Carried, *, max_file_bytes: int = MAX_FILE_BYTES, shows: bool = False) -> None:
    """Write the tensors as the last parts of an HF folder, which ``finish_hf_folder`` then names."""
    if carried.specs:
        with progress(carried.num_bytes, "carried tensors", "bytes", enabled=shows) as bar:
            write_parts(folder, f"zz-{_STEM}", carried.specs, carried.tensors(), bar, max_file_bytes)


def keep_carried(folder: Path, carried: Carried) -> None:
    """Write the tensors beside the configuration of a converted checkpoint."""
    if not carried.specs:
        return
    (folder / _FOLDER).mkdir()
    write_carried(folder / _FOLDER, carried)
    parts = sorted((folder / _FOLDER).glob("*.part"))
    names = [f"model-{n:05d}-of-{len(parts):05d}.safetensors" for n in range(1, len(parts) + 1)]
    for part, name in zip(parts, names, strict=True):
        part.rename(part.with_name(name))
    groups = plan_files(carried.specs, MAX_FILE_BYTES)
    weight_map = {spec.name: name for group, name in zip(groups, names, strict=True) for spec in group}
    _write_json(
        folder / _FOLDER / INDEX_NAME, {"metadata": {"total_size": carried.num_bytes}, "weight_map": weight_map}
    )


def point_to_carried(folder: Path, hf_path: Path) -> None:
    """Write down, beside the configuration of a run's checkpoint, which HF folder has the carried tensors, if the model
    has any."""
    has_table = read_json_object(hf_path / "config.json").get("model_type") in FAMILIES
    if has_table and load_architecture(hf_path).num_mtp_layers:
        _write_json(folder / _POINTER, {"folder": str(hf_path.resolve())})


def _source(folder: Path) -> Path:
    if (folder / _FOLDER).is_dir():
        return folder / _FOLDER
    if not (folder / _POINTER).is_file():
        return folder
    named = Path(str(read_json_object(folder / _POINTER).get("folder")))
    if not named.is_dir():
        raise ValueError(
            f"{folder / _POINTER}: folder={str(named)!r}: is not there; it has the tensors of "
            "num_nextn_predict_layers, which a checkpoint does not repeat"
        )
    return _source(named) if (named / _FOLDER).is_dir() else named


def _write_json(path: Path, value: object) -> None:
    with durable_file(path) as stream:
        stream.write((json.dumps(value, indent=2, sort_keys=True) + "\n").encode())
