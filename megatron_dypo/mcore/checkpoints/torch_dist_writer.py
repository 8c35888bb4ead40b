"""Writes Megatron's ``torch_dist`` checkpoints chunk by chunk; :mod:`.torch_dist` describes the format."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron_dypo.fs import durable_file
from megatron_dypo.mcore.compat.checkpoint_files import storage_info

_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class StoredChunk:
    """A part of a whole tensor, to be written."""

    key: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """Returns the part; its shape only needs the right number of elements."""

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.sizes).numel() * self.dtype.itemsize


class MCoreWriter:
    """Writes a checkpoint into ``folder``: :meth:`write_rank` for each rank's file, then :meth:`finish`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._metadata = Metadata({})
        self._results: list[WriteResult] = []

    def write_rank(self, rank: int, states: Iterable[str], chunks: Iterable[StoredChunk]) -> Iterator[int]:
        """Write the file of one rank: empty states under the given keys, and chunks. Yield the bytes of each chunk."""
        name = f"__{rank}_0.distcp"
        with durable_file(self._folder / name) as stream:

            def put(index: MetadataIndex, value: object) -> None:
                start = stream.tell()
                torch.save(value, stream)
                info = storage_info(name, start, stream.tell() - start)
                self._results.append(WriteResult(index, info.length, info))

            for key in states:
                self._metadata.state_dict_metadata[key] = BytesStorageMetadata()
                put(MetadataIndex(key), [None])
            for chunk in chunks:
                put(self._declare(chunk), _alone(chunk))
                yield chunk.num_bytes

    def _declare(self, chunk: StoredChunk) -> MetadataIndex:
        whole = self._metadata.state_dict_metadata.setdefault(
            chunk.key,
            TensorStorageMetadata(TensorProperties(dtype=chunk.dtype), torch.Size(chunk.shape), []),
        )
        assert isinstance(whole, TensorStorageMetadata)
        whole.chunks.append(ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)))
        return MetadataIndex(chunk.key, chunk.offsets, len(whole.chunks) - 1)

    def finish(self) -> None:
        """Write the files that belong to no rank. Without them the folder is no checkpoint."""
        FileSystemWriter(self._folder).finish(self._metadata, [self._results])
        with durable_file(self._folder / "common.pt") as stream:
            torch.save({}, stream)
        with durable_file(self._folder / "metadata.json") as stream:
            stream.write(json.dumps(_FORMAT).encode())


def _alone(chunk: StoredChunk) -> Tensor:
    """Return the tensor of a chunk in its own storage, since torch.save writes the whole storage of a view."""
    tensor = chunk.read().reshape(chunk.sizes).contiguous()
    assert tensor.dtype == chunk.dtype, chunk
    return tensor if tensor.untyped_storage().nbytes() == chunk.num_bytes else tensor.clone()
