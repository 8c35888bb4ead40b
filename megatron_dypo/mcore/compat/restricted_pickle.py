"""The pickles of a checkpoint, read without running code from it.

``.metadata`` of a ``torch.distributed.checkpoint`` is a pickle, and so are the states that Transformer Engine stores
for FP8. An unpickler calls whatever a pickle names; these know only the classes that such files have.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_dypo.mcore.compat.private_name import PrivateName
from megatron_dypo.parallel.environment import with_variables

LAYOUT = PrivateName(
    package="torch",
    module="torch.serialization",
    name="_get_layout",
    source="pytorch/pytorch v2.13.0 torch/serialization.py:1641",
    oldest="2.0",
    takes=("name",),
)
"""Looks a tensor layout up by its name. Its name stands in ``.metadata``."""

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
# Errors of an unpickler on damaged bytes.
DAMAGED = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    ImportError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
)


class _Unpickler(pickle.Unpickler):
    allowed: dict[str, set[str]]

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in self.allowed.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"refused, since it would run code: it asks for {module}.{name}")


class _MetadataUnpickler(_Unpickler):
    allowed = _METADATA


class _StateUnpickler(_Unpickler):
    allowed = _TE_STATE

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _LOADERS:
            return _load_storage
        if module == _TE_RECIPES and "." not in name:
            found = pickle.Unpickler.find_class(self, module, name)
            if inspect.isclass(found) and found.__module__ == _TE_RECIPES:
                return found
        return super().find_class(module, name)


def _load_storage(content: bytes) -> Any:
    """Read the storage of a tensor inside a pickle as torch's own function does, but without code."""
    return torch.load(io.BytesIO(content), weights_only=True)


def reason(error: Exception) -> str:
    """Return why a pickle was not read, without torch's advice to read it with its code."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith(_ADVICE)]
    return lines[0] if lines else type(error).__name__


def load_metadata(path: Path) -> Metadata:
    """Read a checkpoint's ``.metadata``.

    Raises:
        ValueError: it is damaged, or asks for anything but the classes of such a file. Nothing of it has run.
    """
    try:
        with path.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except DAMAGED as error:
        raise ValueError(f"{path}: damaged: {reason(error)}") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError(f"{path}: damaged: holds no metadata of a checkpoint")
    outside = [name for name in {info.relative_path for info in metadata.storage_data.values()} if "/" in name]
    if outside:
        raise ValueError(f"{path}: refused: it names a file outside of its folder, {outside[0]}")
    return metadata


def require_plain_state(name: str, state: object) -> None:
    """Require that a module's extra state, which Transformer Engine unpickles, runs no code.

    Raises:
        ValueError: it would.
    """
    try:
        if isinstance(state, torch.Tensor) and state.numel() > 0:
            _StateUnpickler(io.BytesIO(state.detach().cpu().numpy().tobytes())).load()
        elif isinstance(state, io.BytesIO):
            torch.load(state, weights_only=True)
            state.seek(0)
    except DAMAGED as error:
        raise ValueError(f"{name}: {reason(error)}") from error


def te_may_unpickle() -> contextlib.AbstractContextManager[None]:
    """Let Transformer Engine unpickle states within the block. Each must have passed :func:`require_plain_state`.

    Since 2.16.1 it refuses the states of delayed scaling unless an environment variable allows all pickles
    (``transformer_engine/pytorch/_extra_state.py``).
    """
    return with_variables({_TE_PERMISSION: "1"})
