"""Rings of buffers that a trainer rank writes and a server rank on the same host reads.

The buffers are host memory, which is passed as a file descriptor, or GPU memory, which is passed as a CUDA IPC handle.
Neither has a name in the file system.
"""

from __future__ import annotations

import base64
import json
import mmap
import os
from typing import Any

import torch
from torch import Tensor

from megatron_dypo.mcore.compat.storages import open_storage, share_storage, shareable_memory
from megatron_dypo.parallel import device


class Ring:
    """[slots, bytes] uint8 shared by two processes. It does not control which of them may use which slot."""

    def __init__(self, slots: Tensor, offer: str, fd: int | None, *, owner: object = None) -> None:
        self.slots = slots
        self._owner = owner  # of the memory; it must live as long
        self.offer = offer
        """JSON with which, and with ``fd``, the other process finds the memory."""
        self.fd = fd
        """Descriptor of host memory. The other process needs a copy of it."""

    def close(self) -> None:
        """Close the descriptor. The memory is freed with the last reference to ``slots`` on both sides."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


def make_ring(num_slots: int, slot_bytes: int) -> Ring:
    """Make a ring on this rank's device."""
    if device.on_gpu():
        with shareable_memory() as owner:
            slots = torch.empty(num_slots, slot_bytes, dtype=torch.uint8, device=device.device())
        offer = json.dumps({"handle": _encoded(share_storage(slots.untyped_storage()))})
        return Ring(slots, offer, None, owner=owner)
    fd = os.memfd_create("megatron-dypo-refit")
    os.fchmod(fd, 0o600)  # Linux gives it 0777
    os.ftruncate(fd, num_slots * slot_bytes)
    offer = json.dumps({"shape": [num_slots, slot_bytes]})
    return Ring(_mapped(fd, num_slots, slot_bytes), offer, fd)


def open_ring(offer: str, fd: int | None, num_slots: int, slot_bytes: int) -> Ring:
    """Open the ring that another process made."""
    if fd is not None:
        return Ring(_mapped(fd, num_slots, slot_bytes), offer, fd)
    storage = open_storage(_decoded(json.loads(offer)["handle"]))
    slots = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).view(num_slots, slot_bytes)
    return Ring(slots, offer, None)


def _mapped(fd: int, num_slots: int, slot_bytes: int) -> Tensor:
    memory = mmap.mmap(fd, num_slots * slot_bytes)
    return torch.frombuffer(memory, dtype=torch.uint8).view(num_slots, slot_bytes)


def _encoded(handle: tuple[Any, ...]) -> list[Any]:
    return [{"bytes": base64.b64encode(one).decode()} if isinstance(one, bytes) else one for one in handle]


def _decoded(handle: list[Any]) -> tuple[Any, ...]:
    return tuple(base64.b64decode(one["bytes"]) if isinstance(one, dict) else one for one in handle)
