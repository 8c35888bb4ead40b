"""Megatron's reading of a checkpoint, with every pickle of it read without running code."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import strategies
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonLoadStrategy
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from megatron_dypo.mcore.compat.private_name import PrivateName
from megatron_dypo.mcore.compat.restricted_pickle import DAMAGED, reason

GET_READER = PrivateName(
    package="megatron-core",
    module="megatron.core.dist_checkpointing.strategies.torch",
    name="_get_filesystem_reader",
    source="NVIDIA/Megatron-LM core_v0.16.1 megatron/core/dist_checkpointing/strategies/torch.py:750",
    oldest="0.12",
    takes=("checkpoint_dir", "cache_metadata"),
)
"""Makes the reader of ``TorchDistLoadShardedStrategy``, which unpickles ``.metadata`` and objects in tensor files."""


class RestrictedCommon(TorchCommonLoadStrategy):
    """Reads ``common.pt`` without code, whatever the environment says (``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD``)."""

    def load_common(self, checkpoint_dir: str | Path) -> Any:
        path = Path(checkpoint_dir) / COMMON_STATE_FNAME
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, OSError, *DAMAGED) as error:
            raise ValueError(f"{path}: damaged: {reason(error)}") from error


class RestrictedReader(FileSystemReader):
    """Reads tensors and objects of a checkpoint whose metadata was read before."""

    def __init__(self, path: str | Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata
        self._folder = Path(path)

    def read_metadata(self) -> Metadata:  # without a rank: there is one file for all
        self._metadata.storage_meta = self._metadata.storage_meta or StorageMeta()
        self._metadata.storage_meta.load_id = self.load_id
        return self._metadata

    def read_data(self, plan: Any, planner: Any) -> Any:
        load_bytes = planner.load_bytes  # torch's planner unpickles with any class

        def load_plain_bytes(item: Any, value: Any) -> None:
            torch.load(value, weights_only=True)
            value.seek(0)
            load_bytes(item, value)

        planner.load_bytes = load_plain_bytes
        by_file: dict[str, list[Any]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in by_file.items():
            try:
                super().read_data(replace(plan, items=items), planner)
            except (RuntimeError, *DAMAGED) as error:
                raise pickle.UnpicklingError(f"{self._folder / name}: damaged: {reason(error)}") from error
        return super().read_data(replace(plan, items=[]), planner)


@contextlib.contextmanager
def restricted_reading(metadata: Metadata) -> Iterator[None]:
    """Let Megatron read a checkpoint that has this metadata by a :class:`RestrictedReader`, within the block."""
    original = GET_READER.get()

    def reader(checkpoint_dir: str | Path, cache_metadata: bool = False) -> RestrictedReader:
        return RestrictedReader(checkpoint_dir, metadata)

    strategies.torch._get_filesystem_reader = reader
    try:
        yield
    finally:
        strategies.torch._get_filesystem_reader = original
