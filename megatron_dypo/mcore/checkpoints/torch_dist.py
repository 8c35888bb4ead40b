"""Megatron's ``torch_dist`` checkpoints, chunk by chunk, without Megatron and without a process group.

The format is that of torch.distributed.checkpoint: ``.metadata`` lists the chunks of every whole tensor with their
files (``*.distcp``) and positions. Megatron adds ``common.pt`` and ``metadata.json``. Whole tensors do not depend on
tensor or pipeline parallelism, except for the padding of the vocabulary.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
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
from megatron_dypo.mcore.compat.checkpoint_files import file_view, storage_info
from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.families.registry import family_rows, stacked_shape, stored_key
from megatron_dypo.models.families.table import Row
from megatron_dypo.models.hf.json_file import refuse_lfs_pointer

HF_FOLDER = "hf"
"""Folder inside a converted checkpoint that keeps configuration and tokenizer."""

WEIGHTS_FOLDER = "mcore"
"""Folder of the tensors inside a step folder of a run."""
RUN_STATE = "trainer_state.json"
"""File that a training run writes beside the folder of its checkpoint's tensors."""

_NOT_WEIGHTS = re.compile(r"(chained_\d+\.)?optimizer\.|rng\.|rng_state")
"""Keys of optimizer and RNG states; ``rng_state`` is Megatron's own name for the latter."""
_FILE = re.compile(r"__(\d+)_\d+\.distcp")
"""Name of a file: the rank that wrote it, and a number."""
# Errors of an unpickler on damaged bytes.
_DAMAGED = (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError)
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


class MCoreReader:
    """The weights of a checkpoint, written by a run or a converter at any parallel sizes.

    ``path`` may also be a step folder of a run, which contains the checkpoint as ``mcore``.

    Raises:
        ValueError: ``path`` is no ``torch_dist`` checkpoint.
    """

    def __init__(self, path: str | Path) -> None:
        folders = [folder for folder in (Path(path), Path(path) / WEIGHTS_FOLDER) if (folder / ".metadata").is_file()]
        if not folders:
            raise ValueError(f"{path}: no .metadata file; a folder of a torch_dist checkpoint is needed")
        self.path = folders[0]
        """Folder of the tensors."""
        self.is_of_run = (self.path.parent / RUN_STATE).is_file()
        """Whether a training run wrote it. Then each pipeline stage wrote its own files."""
        refuse_lfs_pointer(self.path / ".metadata", _beginning(self.path / ".metadata"))
        try:
            metadata = FileSystemReader(self.path).read_metadata()
        except _DAMAGED as error:
            raise ValueError(f"{self.path / '.metadata'}: damaged: {error}") from error
        self._where: dict[MetadataIndex, Any] = metadata.storage_data
        self._wholes = {
            key: whole
            for key, whole in metadata.state_dict_metadata.items()
            if isinstance(whole, TensorStorageMetadata) and not _NOT_WEIGHTS.match(key)
        }

    def dtype(self, row: Row, arch: Architecture) -> torch.dtype:
        """Return the type of a parameter."""
        return self._wholes[stored_key(row.mcore, arch)[0]].properties.dtype

    def check_complete(self, arch: Architecture) -> None:
        """Compare the checkpoint with the family's table: no tensor may be missing, unknown or misshapen.

        Raises:
            ValueError: the message names every wrong tensor, also those with missing chunks.
        """
        expected = {}
        for row in family_rows(arch):
            if not row.is_copy:
                key, index = stored_key(row.mcore, arch)
                expected[key] = (*stacked_shape(index, arch), *row.rule.stored_shape(arch, 1))
        problems = [f"tensor {key} is missing" for key in expected if key not in self._wholes]
        for key, whole in self._wholes.items():
            if key not in expected:
                problems.append(f"tensor {key}: no rule of family {arch.family!r} matches it")
            elif not _same_but_for_padding(tuple(whole.size), expected[key], arch):
                problems.append(f"tensor {key} has shape {tuple(whole.size)}, config.json needs {expected[key]}")
            elif sum(chunk.sizes.numel() for chunk in whole.chunks) != whole.size.numel():
                problems.append(f"tensor {key}: some of its chunks are missing")
            problems += self._missing_files(key, whole)
        if problems:
            raise ValueError(f"{self.path}: " + "; ".join(problems))

    def _missing_files(self, key: str, whole: TensorStorageMetadata) -> list[str]:
        files = {self._where[MetadataIndex(key, chunk.offsets)].relative_path for chunk in whole.chunks}
        return [f"file {file}, which holds {key}, is missing" for file in files if not (self.path / file).is_file()]

    def writer(self, row: Row, arch: Architecture) -> int:
        """Return the first rank that wrote a parameter: the stage's leader, or for an expert its first owner."""
        key, index = stored_key(row.mcore, arch)
        return min(self._rank_of(key, chunk) for chunk in self._chunks_of(key, index))

    def _rank_of(self, key: str, chunk: ChunkStorageMetadata) -> int:
        name = self._where[MetadataIndex(key, chunk.offsets)].relative_path
        found = _FILE.fullmatch(name)
        if found is None:
            raise ValueError(f"{self.path / name}: must be named after the rank that wrote it, as __0_0.distcp is")
        return int(found[1])

    def _chunks_of(self, key: str, index: tuple[int, ...]) -> list[ChunkStorageMetadata]:
        """Return the chunks of a stored tensor that hold a part of the parameter at ``index`` on its first axes."""
        return [
            chunk
            for chunk in self._wholes[key].chunks
            if all(0 <= at - start < size for at, start, size in zip(index, chunk.offsets, chunk.sizes, strict=False))
        ]

    def read_hf(self, row: Row, arch: Architecture) -> tuple[Tensor, ...]:
        """Return the HF tensors of a row. Besides them only one stored chunk is in memory."""
        key, index = stored_key(row.mcore, arch)
        dtype, depth = self.dtype(row, arch), len(index)
        outputs = tuple(torch.empty(shape, dtype=dtype) for shape in row.rule.hf_shapes(arch))
        for chunk in self._chunks_of(key, index):
            inside = tuple(at - start for at, start in zip(index, chunk.offsets[:depth], strict=True))
            row.rule.scatter(self._load(key, chunk)[inside], tuple(chunk.offsets[depth:]), outputs, arch)
        return outputs

    def _load(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        info = self._where[MetadataIndex(key, chunk.offsets)]
        file = self.path / info.relative_path
        refuse_lfs_pointer(file, _beginning(file))
        with file.open("rb") as stream:
            view = file_view(stream, info.offset, info.length)
            try:
                chunk_values: Tensor = torch.load(view, map_location="cpu", weights_only=True)
            except (RuntimeError, *_DAMAGED) as error:
                raise ValueError(f"{file}: damaged at {key}: {error}") from error
        return chunk_values


def _beginning(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(100)


def _alone(chunk: StoredChunk) -> Tensor:
    """Return the tensor of a chunk in its own storage, since torch.save writes the whole storage of a view."""
    tensor = chunk.read().reshape(chunk.sizes).contiguous()
    assert tensor.dtype == chunk.dtype, chunk
    return tensor if tensor.untyped_storage().nbytes() == chunk.num_bytes else tensor.clone()


def _same_but_for_padding(shape: tuple[int, ...], expected: tuple[int, ...], arch: Architecture) -> bool:
    if expected == (arch.vocab_size, arch.hidden_size):
        return len(shape) == 2 and shape[0] >= expected[0] and shape[1] == expected[1]
    return shape == expected
