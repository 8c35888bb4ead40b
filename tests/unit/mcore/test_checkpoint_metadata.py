"""``.metadata`` is read as it was written, and a value that is missing or impossible is named."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_dypo.mcore.compat.checkpoint_files import storage_info
from megatron_dypo.mcore.compat.restricted_pickle import load_metadata


def small() -> Metadata:
    """Return the metadata of a tensor of two chunks and of an object."""
    sizes = torch.Size([1, 3])
    chunks = [ChunkStorageMetadata(torch.Size([row, 0]), sizes) for row in range(2)]
    whole = TensorStorageMetadata(TensorProperties(dtype=torch.bfloat16), torch.Size([2, 3]), chunks)
    places = {MetadataIndex("w", chunk.offsets): storage_info("a", 9 * n, 9) for n, chunk in enumerate(chunks)}
    places[MetadataIndex("o")] = storage_info("b", 0, 5)
    return Metadata({"w": whole, "o": BytesStorageMetadata()}, storage_data=places)


def first_chunk(metadata: Any) -> Any:
    return metadata.state_dict_metadata["w"].chunks[0]


def place(metadata: Metadata, index: MetadataIndex | None = None) -> Any:
    return metadata.storage_data[index or MetadataIndex("w", torch.Size([0, 0]))]


WRONG: dict[str, tuple[Callable[[Any], object], str]] = {
    "no tensors": (
        lambda m: setattr(m, "state_dict_metadata", None),
        "it: state_dict_metadata=None: must be a mapping",
    ),
    "no places": (lambda m: setattr(m, "storage_data", [1]), r"it: storage_data=\[1\]: must be a mapping"),
    "place gone": (lambda m: m.storage_data.pop(MetadataIndex("o")), "o: the place is missing"),
    "chunk's place gone": (
        lambda m: m.storage_data.pop(MetadataIndex("w", torch.Size([1, 0]))),
        r"w: the place of the chunk at \(1, 0\) is missing",
    ),
    "no dtype": (
        lambda m: setattr(m.state_dict_metadata["w"].properties, "dtype", torch.Size),
        r"tensor w: dtype=.*: must be a type of torch",
    ),
    "no properties": (
        lambda m: setattr(m.state_dict_metadata["w"], "properties", 3),
        "tensor w: properties: 3: must be a TensorProperties",
    ),
    "no size": (lambda m: setattr(m.state_dict_metadata["w"], "size", [2, 3]), "tensor w: size=None: must be integers"),
    "chunk gone": (lambda m: m.state_dict_metadata["w"].chunks.pop(), "tensor w: some of its chunks are missing"),
    "chunk twice": (
        lambda m: m.state_dict_metadata["w"].chunks.__setitem__(1, first_chunk(m)),
        "tensor w: some of its chunks are missing or overlap",
    ),
    "chunk outside": (
        lambda m: setattr(first_chunk(m), "sizes", torch.Size([1, 4])),
        r"tensor w of shape \(2, 3\): has a chunk \(1, 4\) at \(0, 0\)",
    ),
    "chunk of fewer axes": (
        lambda m: setattr(first_chunk(m), "sizes", torch.Size([3])),
        r"tensor w of shape \(2, 3\): has a chunk \(3,\) at \(0, 0\)",
    ),
    "negative size": (lambda m: setattr(first_chunk(m), "sizes", torch.Size([-1, 3])), "must be integers from 0"),
    "negative offset": (lambda m: setattr(place(m), "offset", -1), "storage_data of w: offset=-1: must be an integer"),
    "no length": (lambda m: setattr(place(m), "length", None), "storage_data of w: length=None: must be an integer"),
    "no file": (lambda m: setattr(place(m), "relative_path", b"a"), "relative_path: b'a': must be a text"),
    "same place": (lambda m: setattr(place(m), "offset", 8), "storage_data of w and w: they overlap in a"),
    "other class": (
        lambda m: m.storage_data.update({MetadataIndex("o"): torch.Size([1])}),
        "storage_data of o: .*: must be a _StorageInfo",
    ),
    "transforms": (lambda m: setattr(place(m), "transform_descriptors", ["z"]), r"transform_descriptors=\['z'\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_metadata_that_is_incomplete_or_impossible_is_named(case: str, tmp_path: Path) -> None:
    change, message = WRONG[case]
    metadata, path = small(), tmp_path / ".metadata"
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=rf"^{path}: damaged: .*{message}"):
        load_metadata(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_metadata_is_read_as_an_unpickler_with_code_reads_it(protocol: int, tmp_path: Path) -> None:
    path, metadata = tmp_path / ".metadata", small()
    metadata.planner_data, metadata.version = {"w": ("w", 3)}, "1.0"
    path.write_bytes(pickle.dumps(metadata, protocol=protocol))
    read = load_metadata(path)
    assert (read.state_dict_metadata, read.storage_data) == (metadata.state_dict_metadata, metadata.storage_data)
