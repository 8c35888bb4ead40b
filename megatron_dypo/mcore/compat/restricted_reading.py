"""Megatron's reading of a checkpoint, with every pickle of it read without running code."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization, strategies
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta

from megatron_dypo.mcore.compat.checkpoint_files import file_view
from megatron_dypo.mcore.compat.core_version import CORE
from megatron_dypo.mcore.compat.plain_pickle import DAMAGED
from megatron_dypo.mcore.compat.private_name import PrivateName
from megatron_dypo.mcore.compat.restricted_pickle import reason

GET_READER = PrivateName(
    package="megatron-core",
    module="megatron.core.dist_checkpointing.strategies.torch",
    name="_get_filesystem_reader",
    source="NVIDIA/Megatron-LM core_v0.16.1 megatron/core/dist_checkpointing/strategies/torch.py:750",
    oldest="0.12",
    takes=("checkpoint_dir", "cache_metadata"),
)
"""Makes the reader of ``TorchDistLoadShardedStrategy``, which unpickles ``.metadata`` and objects in tensor files."""

_COMMON_STATE = "common_state/shard_0_1"
"""Name under which core 0.19 stores the state besides tensors."""


def load(state: dict[str, Any], folder: Path, metadata: Metadata) -> dict[str, Any]:
    """Return ``state`` with the values of the checkpoint in ``folder``, by Megatron's ``load``. Collective over the
    world.

    No pickle of the checkpoint runs code. The state besides tensors is in ``common.pt``, or in a tensor file if core
    0.19 or later wrote the checkpoint; every core reads both.

    Args:
        metadata: content of the folder's ``.metadata``.

    Raises:
        ValueError: the state besides tensors is damaged, or would run code.
        pickle.UnpicklingError: a tensor file is damaged, or would run code.
    """
    with _replaced(metadata):
        loaded: dict[str, Any] = dist_checkpointing.load(
            state, str(folder), sharded_strategy=TorchDistLoadShardedStrategy(), **_common_strategy(metadata)
        )
    return loaded


def load_common(folder: Path, metadata: Metadata) -> Any:
    """Read the state besides tensors without code, whatever the environment says
    (``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD``)."""
    path, info = folder / COMMON_STATE_FNAME, metadata.storage_data.get(MetadataIndex(_COMMON_STATE))
    try:
        if path.is_file() or info is None:
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            path = folder / info.relative_path
            with path.open("rb") as stream:
                view = file_view(stream, info.offset, info.length)
                state = torch.load(view, map_location="cpu", weights_only=True)[0]
    except (RuntimeError, OSError, *DAMAGED) as error:
        raise ValueError(f"{path}: damaged: {reason(error)}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: damaged: holds {type(state).__name__}, must hold a mapping")
    return state


def _common_strategy(metadata: Metadata) -> dict[str, Any]:
    """Return the argument by which core 0.16 is told how to read the common state; later ones have only a function."""
    if CORE >= (0, 17):
        return {}
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy

    class RestrictedCommon(TorchCommonLoadStrategy):
        def load_common(self, checkpoint_dir: str | Path) -> Any:
            return load_common(Path(checkpoint_dir), metadata)

    return {"common_strategy": RestrictedCommon()}


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
def _replaced(metadata: Metadata) -> Iterator[None]:
    """Let Megatron read a checkpoint that has this metadata by a :class:`RestrictedReader`, within the block."""
    GET_READER.get()

    def reader(checkpoint_dir: str | Path, *args: Any, **kwargs: Any) -> RestrictedReader:
        return RestrictedReader(checkpoint_dir, metadata)

    replaced: list[tuple[Any, str, Any]] = [(strategies.torch, "_get_filesystem_reader", reader)]
    if CORE >= (0, 17):
        name = "load_common" if CORE < (0, 19) else "load_common_state_dict"
        replaced.append((serialization, name, lambda folder: load_common(Path(folder), metadata)))
    originals = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    for module, name, ours in replaced:
        setattr(module, name, ours)
    try:
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)
