"""The positions of tensors in the files of a ``torch.distributed.checkpoint``."""

from __future__ import annotations

from typing import Any, BinaryIO

from megatron_dypo.mcore.compat.private_name import PrivateName

STORAGE_INFO = PrivateName(
    package="torch",
    module="torch.distributed.checkpoint.filesystem",
    name="_StorageInfo",
    source="pytorch/pytorch v2.13.0 torch/distributed/checkpoint/filesystem.py:75",
    oldest="2.0",
    takes=("relative_path", "offset", "length"),
)
"""File, start and length of a stored chunk. ``FileSystemReader`` finds it in ``.metadata``."""

FILE_VIEW = PrivateName(
    package="torch",
    module="torch.distributed.checkpoint.utils",
    name="_create_file_view",
    source="pytorch/pytorch v2.13.0 torch/distributed/checkpoint/utils.py:427",
    oldest="2.0",
    takes=("file", "offset", "length"),
)
"""Wraps a part of a file as a file."""


def storage_info(file: str, start: int, length: int) -> Any:
    """Return the entry of ``.metadata`` for a chunk in ``file``: ``length`` bytes from ``start``."""
    return STORAGE_INFO.get()(file, start, length)


def file_view(stream: BinaryIO, start: int, length: int) -> BinaryIO:
    """Return ``length`` bytes of ``stream`` from ``start`` as a file that torch.load reads, without a copy."""
    view: BinaryIO = FILE_VIEW.get()(stream, start, length)
    return view
