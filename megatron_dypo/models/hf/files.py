"""The safetensors files of an HF folder, and the file of each tensor."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_dypo.models.hf.json_file import read_json_object, refuse_lfs_pointer, shown

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class SafetensorsFiles:
    """The opened files of a folder. Slicing a tensor reads only the slice.

    Raises:
        ValueError: there is neither an index nor a single file, or both but they do not belong together; the index is
            not an index; a file is missing, a git-lfs pointer, truncated or damaged; a tensor is in the index but not
            in its file, or is in two files.
    """

    def __init__(self, folder: Path) -> None:
        index, single = folder / INDEX_NAME, folder / SINGLE_NAME
        if not index.is_file() and not single.is_file():
            raise ValueError(f"{folder}: neither {INDEX_NAME} nor {SINGLE_NAME} is there; weights must be safetensors")
        named = read_weight_map(index) if index.is_file() else {}
        if named and single.is_file() and SINGLE_NAME not in named.values():
            raise ValueError(
                f"{folder}: {INDEX_NAME} names other files than {SINGLE_NAME}, which is there too and which "
                "transformers reads: remove what does not belong to the model"
            )
        self._opened = {file: _open(folder / file) for file in dict.fromkeys(named.values())} or {
            SINGLE_NAME: _open(single)
        }
        self.file_of = self._locate(folder, named)
        """Tensor → its file. Tensors of the index come first, in its order."""

    def _locate(self, folder: Path, named: dict[str, str]) -> dict[str, str]:
        file_of: dict[str, str] = {}
        for file, opened in self._opened.items():
            for name in opened.keys():  # noqa: SIM118, a safetensors handle is no mapping
                if name in file_of:
                    raise ValueError(f"{folder / file}: tensor {name} stands in {file_of[name]} too")
                file_of[name] = file
        for name, file in named.items():
            if file_of.get(name) != file:
                raise ValueError(f"{folder / file}: tensor {name} is missing, although {INDEX_NAME} names it")
        return {**named, **file_of}

    def slice(self, name: str) -> Any:
        """Return a lazy view of a tensor. Indexing it reads that part."""
        return self._opened[self.file_of[name]].get_slice(name)


def files_of_weights(folder: Path) -> list[Path]:
    """Return the safetensors files that hold the weights of an HF folder, in the order of their names.

    Raises:
        ValueError: they are not whole; see :class:`SafetensorsFiles`.
    """
    return sorted(folder / file for file in set(SafetensorsFiles(folder).file_of.values()))


def read_weight_map(index: Path) -> dict[str, str]:
    """Return tensor → file of an index.

    Raises:
        ValueError: it is not a JSON object with a ``weight_map`` from names to files of this folder.
    """
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map={shown(weight_map)}: must be an object of tensor names and their files")
    for name, file in weight_map.items():
        place = f"{index}: weight_map.{name}={shown(file)}"
        if not isinstance(file, str) or not file or "\0" in file:
            raise ValueError(f"{place}: must be the name of a file")
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise ValueError(f"{place}: must be a file of this folder")
        if not (index.parent / file).is_file():
            raise ValueError(f"{index.parent / file}: no such file, although {INDEX_NAME} names it for tensor {name}")
    return weight_map


def _open(path: Path) -> Any:
    try:
        with path.open("rb") as stream:
            refuse_lfs_pointer(path, stream.read(100))
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not a safetensors file, or a truncated or damaged one ({path.stat().st_size} bytes): {error}"
        ) from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
