"""Reads Megatron's ``torch_dist`` checkpoints chunk by chunk, without Megatron and without a process group.

The format is that of torch.distributed.checkpoint: ``.metadata`` lists the chunks of every whole tensor with their
files (``*.distcp``) and positions. Megatron adds ``common.pt`` and ``metadata.json``. Whole tensors do not depend on
tensor or pipeline parallelism, except for the padding of the vocabulary.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_dypo.mcore.checkpoints.manifest import BLOCK_BYTES, Block
from megatron_dypo.mcore.compat.checkpoint_files import file_view
from megatron_dypo.mcore.compat.plain_pickle import DAMAGED
from megatron_dypo.mcore.compat.restricted_pickle import load_metadata, reason
from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.families.registry import family_rows, stacked_shape, stored_key
from megatron_dypo.models.families.table import Row
from megatron_dypo.models.hf.json_file import refuse_lfs_pointer
from megatron_dypo.models.hf.read import DTYPES

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


class MCoreReader:
    """The weights of a checkpoint, written by a run or a converter at any parallel sizes.

    ``path`` may also be a step folder of a run, which contains the checkpoint as ``mcore``.

    Raises:
        ValueError: ``path`` is no ``torch_dist`` checkpoint.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = weights_folder(path)
        """Folder of the tensors."""
        self.is_of_run = (self.path.parent / RUN_STATE).is_file()
        """Whether a training run wrote it. Then each pipeline stage wrote its own files."""
        refuse_lfs_pointer(self.path / ".metadata", _beginning(self.path / ".metadata"))
        metadata = load_metadata(self.path / ".metadata")
        self._where: dict[MetadataIndex, Any] = metadata.storage_data
        self._wholes = {
            key: whole
            for key, whole in metadata.state_dict_metadata.items()
            if isinstance(whole, TensorStorageMetadata) and not _NOT_WEIGHTS.match(key)
        }

    def reads(self, block: Block) -> bool:
        """Tell whether a block of the checkpoint's files holds anything that is read here: weights, or no tensors."""
        name = block.name.rpartition("/")[2]
        if not _FILE.fullmatch(name):
            return True
        is_here = not self.is_of_run or block.name == f"{self.path.name}/{name}"
        return is_here and (name, block.start // BLOCK_BYTES) in self._blocks

    @functools.cached_property
    def _blocks(self) -> set[tuple[str, int]]:
        """The blocks that hold weights, by file and number."""
        weights = [info for index, info in self._where.items() if index.fqn in self._wholes]
        return {
            (info.relative_path, number)
            for info in weights
            for number in range(info.offset // BLOCK_BYTES, (info.offset + info.length - 1) // BLOCK_BYTES + 1)
        }

    def dtype(self, row: Row, arch: Architecture) -> torch.dtype:
        """Return the type of a parameter."""
        return self._wholes[stored_key(row.mcore, arch)[0]].properties.dtype

    def check_complete(self, arch: Architecture) -> None:
        """Compare the checkpoint with the family's table: no tensor may be missing, unknown or misshapen.

        Raises:
            ValueError: the message names every wrong tensor, also those whose files are missing.
        """
        expected = {}
        for row in family_rows(arch):
            if not row.is_copy:
                key, _ = stored_key(row.mcore, arch)
                expected[key] = (*stacked_shape(row.mcore, arch), *row.rule.stored_shape(arch, 1))
        problems = [f"tensor {key} is missing" for key in expected if key not in self._wholes]
        for key, whole in self._wholes.items():
            if key not in expected:
                problems.append(f"tensor {key}: no rule of family {arch.family!r} matches it")
            elif not _same_but_for_padding(tuple(whole.size), expected[key], arch):
                problems.append(f"tensor {key} has shape {tuple(whole.size)}, config.json needs {expected[key]}")
            elif whole.properties.dtype not in DTYPES.values():
                problems.append(f"tensor {key} has type {whole.properties.dtype}: must be one of {', '.join(DTYPES)}")
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
        """Read a chunk. Raises ValueError if the file holds anything but what ``.metadata`` says."""
        info = self._where[MetadataIndex(key, chunk.offsets)]
        file = self.path / info.relative_path
        refuse_lfs_pointer(file, _beginning(file))
        with file.open("rb") as stream:
            view = file_view(stream, info.offset, info.length)
            try:
                values: Any = torch.load(view, map_location="cpu", weights_only=True)
            except (RuntimeError, *DAMAGED) as error:
                raise ValueError(f"{file}: damaged at {key}: {reason(error)}") from error
        dtype = self._wholes[key].properties.dtype
        if not isinstance(values, Tensor) or (values.shape, values.dtype) != (chunk.sizes, dtype):
            found = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"{file}: damaged at {key}: holds {found}, .metadata has {dtype} {tuple(chunk.sizes)}")
        return values


def weights_folder(path: str | Path) -> Path:
    """Return the folder of the tensors: ``path``, or ``mcore`` in it. Raises ValueError if neither has a checkpoint."""
    for folder in (Path(path), Path(path) / WEIGHTS_FOLDER):
        if (folder / ".metadata").is_file():
            return folder
    raise ValueError(f"{path}: no .metadata file; a folder of a torch_dist checkpoint is needed")


def _beginning(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(100)


def _same_but_for_padding(shape: tuple[int, ...], expected: tuple[int, ...], arch: Architecture) -> bool:
    if expected == (arch.vocab_size, arch.hidden_size):
        return len(shape) == 2 and shape[0] >= expected[0] and shape[1] == expected[1]
    return shape == expected
