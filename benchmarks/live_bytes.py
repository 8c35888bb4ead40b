"""Count the bytes of all live tensors exactly, for machines whose allocator keeps no statistics."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """A counter of live storages: each counts from the operation that makes it until it is freed.

    Views share a storage and count once. Memory that a kernel allocates and frees inside is not counted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result

    def count(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count the storages of these tensors too, each once."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._forget, key).atexit = False
        self.peak = max(self.peak, self.now)

    def reset_peak(self) -> None:
        self.peak = self.now

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def distinct_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the storages of these tensors, each counted once."""
    return sum({s._cdata: s.nbytes() for s in _storages(tensors)}.values())


def _storages(tensors: Iterable[torch.Tensor]) -> Iterator[Any]:
    return (tensor.untyped_storage() for tensor in tensors)
