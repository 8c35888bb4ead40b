"""The pickles of a checkpoint, read without running code from it.

``.metadata`` of a ``torch.distributed.checkpoint`` is a pickle, and so are the states that Transformer Engine stores
for FP8. An unpickler calls whatever a pickle names; these know only the names that such files have, and call none.
"""

from __future__ import annotations

import contextlib
import enum
import gc
import importlib
import inspect
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_dypo.mcore.compat.checkpoint_metadata import DTYPES, as_metadata
from megatron_dypo.mcore.compat.plain_pickle import DAMAGED, Name, PlainUnpickler
from megatron_dypo.parallel.environment import with_variables

_METADATA = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath"},
}
"""Module → names in a ``.metadata``; types of tensors are allowed too."""
_TE_STATE = {
    "torch": {"Size", "device"},
    "torch._utils": {"_rebuild_tensor_v2"},
    "collections": {"OrderedDict"},
    "megatron.core.extensions.transformer_engine": {"TEDelayedScaling"},
}
_LOADERS = {("torch.storage", "_load_from_bytes"), ("megatron.core.safe_globals", "safe_load_from_bytes")}
"""Functions that read the storage of a tensor inside a pickle: torch's, and that by which core 0.17 and later replace
it, so that it stands in the pickles of their runs."""
_TE_PERMISSION = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
_TE_RECIPES = "transformer_engine.common.recipe"
_ADVICE = ("Weights only load failed", "Please file an issue", "Check the documentation")
"""Beginnings of lines of torch's message."""


class _MetadataUnpickler(PlainUnpickler):
    def knows(self, name: Name) -> bool:
        return name in DTYPES or name.name in _METADATA.get(name.module, ())


class _StateUnpickler(PlainUnpickler):
    """Reads a pickle that Transformer Engine will unpickle after it, by an unpickler that refuses nothing."""

    def knows(self, name: Name) -> bool:
        is_known = name.name in _TE_STATE.get(name.module, ()) or (name.module, name.name) in _LOADERS
        return is_known or name in DTYPES or _recipe(name) is not None

    def make(self, name: Name, args: tuple[Any, ...], *, is_new: bool) -> object:
        if (name.module, name.name) in _LOADERS:
            _check_storage(*args)
        recipe = _recipe(name)
        # The members of an enumeration are shared, so the pickle must not change them as if they were new.
        is_shared = recipe is not None and issubclass(recipe, enum.Enum)
        return super().make(name, args, is_new=is_new and not is_shared)


def _recipe(name: Name) -> type | None:
    """Return the class of a recipe of Transformer Engine; None if the name is none."""
    if name.module != _TE_RECIPES or "." in name.name:
        return None
    found = getattr(importlib.import_module(_TE_RECIPES), name.name)
    return found if inspect.isclass(found) and found.__module__ == _TE_RECIPES else None


def _check_storage(content: bytes) -> None:
    """Read the storage of a tensor inside a pickle as torch's own function does, but without code."""
    torch.load(io.BytesIO(content), weights_only=True)


def reason(error: Exception) -> str:
    """Return why a pickle was not read, without torch's advice to read it with its code."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith(_ADVICE)]
    return lines[0] if lines else type(error).__name__


def load_metadata(path: Path) -> Metadata:
    """Read a checkpoint's ``.metadata``.

    Raises:
        ValueError: it is damaged or incomplete, or asks for anything but the classes of such a file. Nothing of it has
            run or changed anything.
    """
    try:
        content = path.read_bytes()
        with _no_collection():
            return as_metadata(_MetadataUnpickler(content).load())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except DAMAGED as error:
        raise ValueError(f"{path}: damaged: {reason(error)}") from error


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from looking at a million new objects again and again: a quarter of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def require_plain_state(name: str, state: object) -> None:
    """Require that a module's extra state, which Transformer Engine unpickles, runs no code.

    Raises:
        ValueError: it would.
    """
    try:
        if isinstance(state, torch.Tensor) and state.numel() > 0:
            _StateUnpickler(state.detach().cpu().numpy().tobytes()).load()
        elif isinstance(state, io.BytesIO):
            torch.load(state, weights_only=True)
            state.seek(0)
    except (RuntimeError, *DAMAGED) as error:
        raise ValueError(f"{name}: {reason(error)}") from error


def te_may_unpickle() -> contextlib.AbstractContextManager[None]:
    """Let Transformer Engine unpickle states within the block. Each must have passed :func:`require_plain_state`.

    Since 2.16.1 it refuses the states of delayed scaling unless an environment variable allows all pickles
    (``transformer_engine/pytorch/_extra_state.py``).
    """
    return with_variables({_TE_PERMISSION: "1"})
