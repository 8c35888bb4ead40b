"""The objects of a ``.metadata``, made from records only after each value was checked.

Nothing else is in the result: the plans and mappings that a saver also stores there are not read back.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_dypo.mcore.compat.boxes import Box, fill
from megatron_dypo.mcore.compat.checkpoint_files import STORAGE_INFO
from megatron_dypo.mcore.compat.plain_pickle import Name, Record
from megatron_dypo.models.hf.json_file import shown

_CLASSES = "torch.distributed.checkpoint.metadata"
_METADATA = Name(_CLASSES, "Metadata")
_INDEX = Name(_CLASSES, "MetadataIndex")
_TENSOR = Name(_CLASSES, "TensorStorageMetadata")
_OBJECT = Name(_CLASSES, "BytesStorageMetadata")
_CHUNK = Name(_CLASSES, "ChunkStorageMetadata")
_PROPERTIES = Name(_CLASSES, "TensorProperties")
_INFO = Name("torch.distributed.checkpoint.filesystem", "_StorageInfo")
_SIZE = Name("torch", "Size")
DTYPES = {Name("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
"""Types of tensors by the names that pickles give them."""
_LARGEST = 2**63 - 1


def as_metadata(found: object) -> Metadata:
    """Return the metadata of a checkpoint: its tensors and objects, and where their parts are.

    Raises:
        ValueError: a value is missing, is of another type or is impossible; a part has no place in a file, or two have
            the same; or the parts of a tensor do not fill it.
    """
    fields = _fields(found, _METADATA, "it")
    places = dict(_places(_mapping(fields, "storage_data", "it")))
    _require_apart(places)
    wholes = {
        _text(key, "a name of state_dict_metadata"): _whole(key, value, places)
        for key, value in _mapping(fields, "state_dict_metadata", "it").items()
    }
    return Metadata(wholes, storage_data=places)


def _whole(
    key: str, value: object, places: Mapping[MetadataIndex, Any]
) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(value) is Record and value.name == _OBJECT:
        _require_placed(key, MetadataIndex(key), places)
        return BytesStorageMetadata()
    where = f"tensor {_named(key)}"
    fields = _fields(value, _TENSOR, where)
    size, chunks = _size(fields.get("size"), f"{where}: size"), fields.get("chunks")
    if type(chunks) is not list:
        raise ValueError(f"{where}: chunks={shown(chunks)}: must be a list")
    boxes = [_box(chunk, size, where) for chunk in chunks]
    for start, _ in boxes:
        _require_placed(key, MetadataIndex(key, start), places)
    if not fill(boxes, size):
        raise ValueError(f"{where}: some of its chunks are missing or overlap")
    properties = TensorProperties(dtype=_dtype(fields.get("properties"), where))
    return TensorStorageMetadata(properties, size, list(itertools.starmap(ChunkStorageMetadata, boxes)))


def _box(chunk: object, size: torch.Size, where: str) -> Box:
    fields = _fields(chunk, _CHUNK, f"{where}: a chunk")
    start = _size(fields.get("offsets"), f"{where}: offsets of a chunk")
    length = _size(fields.get("sizes"), f"{where}: sizes of a chunk")
    if not len(start) == len(length) == len(size) or any(map(lambda a, b, c: a + b > c, start, length, size)):
        raise ValueError(f"{where} of shape {tuple(size)}: has a chunk {tuple(length)} at {tuple(start)}")
    return start, length


def _dtype(properties: object, where: str) -> torch.dtype:
    state = _fields(properties, _PROPERTIES, f"{where}: properties", kind=tuple)
    name = state[0] if state else None
    dtype = DTYPES.get(name) if type(name) is Name else None
    if dtype is None:
        raise ValueError(f"{where}: dtype={shown(name)}: must be a type of torch")
    return dtype


def _places(stored: Mapping[Any, Any]) -> Iterator[tuple[MetadataIndex, Any]]:
    make = STORAGE_INFO.get()
    for key, value in stored.items():
        index = _fields(key, _INDEX, "a key of storage_data")
        fqn = _text(index.get("fqn"), "a key of storage_data: fqn")
        where = f"storage_data of {_named(fqn)}"
        offset = index.get("offset")
        start = None if offset is None else _size(offset, f"{where}: offset")
        info = _fields(value, _INFO, where)
        if info.get("transform_descriptors"):
            raise ValueError(f"{where}: transform_descriptors={shown(info['transform_descriptors'])}: cannot be read")
        file = _text(info.get("relative_path"), f"{where}: relative_path")
        if "/" in file or file in ("", ".", "..") or "\0" in file:
            raise ValueError(f"refused: it names a file outside of its folder, {_named(file)}")
        place = _number(info, "offset", 0, where), _number(info, "length", 1, where)
        yield MetadataIndex(fqn, start), make(file, *place)


def _require_apart(places: Mapping[MetadataIndex, Any]) -> None:
    """Require that no two entries have a byte of a file in common."""
    order = sorted(places.items(), key=lambda item: (item[1].relative_path, item[1].offset))
    for (one, before), (other, after) in itertools.pairwise(order):
        if before.relative_path == after.relative_path and before.offset + before.length > after.offset:
            names = f"{_named(one.fqn)} and {_named(other.fqn)}"
            raise ValueError(f"storage_data of {names}: they overlap in {_named(after.relative_path)}")


def _require_placed(key: str, index: MetadataIndex, places: Mapping[MetadataIndex, Any]) -> None:
    if index not in places:
        at = "" if index.offset is None else f" of the chunk at {tuple(index.offset)}"
        raise ValueError(f"{_named(key)}: the place{at} is missing")


def _fields(found: object, name: Name, where: str, kind: type = dict) -> Any:
    """Return the state of a record, a dict of its fields."""
    if type(found) is not Record or found.name != name or found.args or type(found.state) is not kind:
        raise ValueError(f"{where}: {shown(found)}: must be a {name.name}")
    return found.state


def _mapping(fields: Mapping[str, Any], name: str, where: str) -> dict[Any, Any]:
    value = fields.get(name)
    if type(value) is not dict:
        raise ValueError(f"{where}: {name}={shown(value)}: must be a mapping")
    return value


def _text(value: object, where: str) -> str:
    if type(value) is not str:
        raise ValueError(f"{where}: {shown(value)}: must be a text")
    return value


def _named(text: str) -> str:
    """Return a name for a message: as it is, unless it would break the line."""
    return text if text.isprintable() and len(text) <= 200 else shown(text)


def _number(fields: Mapping[str, Any], name: str, least: int, where: str) -> int:
    value = fields.get(name)
    if type(value) is not int or not least <= value <= _LARGEST:
        raise ValueError(f"{where}: {name}={shown(value)}: must be an integer from {least} to 2**63 - 1")
    return value


def _size(value: object, where: str) -> torch.Size:
    is_one = type(value) is Record and value.name == _SIZE and len(value.args) == 1
    numbers = value.args[0] if type(value) is Record and is_one else None
    if type(numbers) is not tuple or any(type(one) is not int or not 0 <= one <= _LARGEST for one in numbers):
        raise ValueError(f"{where}={shown(numbers)}: must be integers from 0 to 2**63 - 1")
    return torch.Size(numbers)
