"""The manifest of a checkpoint that several ranks have written."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_dypo.mcore.checkpoints.manifest import FileRecord, list_files, record_files, write_manifest
from megatron_dypo.parallel.position import Position

_OF_RANK = re.compile(r"[^/]+/__(\d+)_\d+\.distcp")
_OF_LEADER = re.compile(r"leader_\d+\.bin")


def seal(
    partial: Path,
    at: Position,
    gather: Callable[[Any], Sequence[Any]],
    *,
    known: Mapping[str, FileRecord] = MappingProxyType({}),
) -> None:
    """Write the manifest of a checkpoint whose files are all there. Collective over the world.

    Each rank reads the files back that it wrote, which are still in its page cache: Megatron writes them in processes
    of its own, from which no checksum comes back. Only names, sizes and checksums are sent.

    Args:
        known: records of files of this rank, which are not read again.

    Raises:
        OSError: a rank cannot read a file of its own. It is raised on all ranks.
    """
    own: Any
    try:
        own = {**known, **record_files(partial, [name for name in written_by(partial, at) if name not in known])}
    except OSError as error:
        own = (error.errno, f"rank {at.rank}: {error.strerror}", error.filename)
    parts = gather(own)
    for part in parts:
        if isinstance(part, tuple):
            raise OSError(*part)
    if at.is_global_leader:
        records = {name: record for part in parts for name, record in part.items()}
        unrecorded = list_files(partial).keys() - records.keys()
        assert not unrecorded, unrecorded
        write_manifest(partial, records)


def written_by(partial: Path, at: Position) -> list[str]:
    """Return the names of the files that one rank wrote. The global leader wrote all that has no rank in its name."""
    names = tensor_files(partial, at.rank)
    if at.is_replica_leader:
        names.append(f"leader_{at.dp_rank:05d}.bin")
    if at.is_global_leader:
        names += [name for name in list_files(partial) if not (_OF_RANK.fullmatch(name) or _OF_LEADER.fullmatch(name))]
    return names


def tensor_files(partial: Path, rank: int) -> list[str]:
    """Return the names of the tensor files that one rank wrote."""
    found = sorted(file.relative_to(partial).as_posix() for file in partial.glob(f"*/__{rank}_*.distcp"))
    return [name for name in found if _OF_RANK.fullmatch(name)]
