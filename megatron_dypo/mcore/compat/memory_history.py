"""PyTorch's record of allocations on a GPU."""

from __future__ import annotations

from pathlib import Path

from megatron_dypo.mcore.compat.private_name import PrivateName

_MODULE = "torch.cuda.memory"

RECORD = PrivateName(
    package="torch",
    module=_MODULE,
    name="_record_memory_history",
    source="pytorch/pytorch v2.13.0 torch/cuda/memory.py:892 (_record_memory_history)",
    oldest="2.1",
)
"""Begins to record allocations with their stacks."""

DUMP = PrivateName(
    package="torch",
    module=_MODULE,
    name="_dump_snapshot",
    source="pytorch/pytorch v2.13.0 torch/cuda/memory.py:1129 (_dump_snapshot)",
    oldest="2.1",
    takes=("filename",),
)
"""Writes the record to a file."""

_MAX_ENTRIES = 200_000
"""Allocations and frees that are kept, about a hundred megabytes of the host's memory."""


def record_memory() -> None:
    """Begin to record the allocations on this rank's GPU."""
    RECORD.get()(max_entries=_MAX_ENTRIES)


def dump_memory(path: Path) -> None:
    """Write the record."""
    DUMP.get()(filename=str(path))
