"""The verification of a checkpoint against its manifest, shared by the ranks that will load it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_dypo.mcore.checkpoints.folder import STATE
from megatron_dypo.mcore.checkpoints.manifest import (
    MANIFEST,
    DamageError,
    blocks_of,
    read_manifest,
    require_blocks,
    require_files,
)
from megatron_dypo.metrics.progress import progress

Verify = Literal["manifest", "full"]
"""``manifest``: names and sizes of all files, and checksums of all but the tensor files. ``full``: all checksums."""
HAS_MANIFEST = "has_manifest"
"""Key of ``trainer_state.json`` in a checkpoint that was written with a manifest."""
log = logging.getLogger(__name__)

_TENSORS = ".distcp"
_READ = re.compile(r"(leader_[^/]*\.bin|.*/(?!\.nfs)[^/]*)")
"""Names of files that some reader of a checkpoint would take up. ``.nfs…`` is a removed file that is still open."""


@dataclass(frozen=True, kw_only=True)
class Readers:
    """The ranks that read a checkpoint together; this process is one of them."""

    rank: int = 0
    count: int = 1
    gather: Callable[[Any], Sequence[Any]] = lambda value: [value]
    """Returns the value of every rank, in rank order, to every rank."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0


ALONE = Readers()
"""A single process that reads everything."""


def find_damage(
    checkpoint: Path, verify: Verify, readers: Readers = ALONE, *, show_progress: bool = False
) -> str | None:
    """Compare a checkpoint with its manifest; return the damaged file and the reason, None if there is none.

    Collective over ``readers``: each reads its share of the files, and all return the same. A checkpoint of a version
    that wrote no manifest has none to be compared with; a warning says so.
    """
    outer = _look_from_outside(checkpoint) if readers.is_first else _Outside()
    found: _Outside = readers.gather(outer)[0]
    if found.damage is not None or not found.has_manifest:
        return found.damage
    own = _damage(lambda: _require_share(checkpoint, verify, readers, show_progress))
    return next((one for one in readers.gather(own) if one is not None), None)


@dataclass(frozen=True, kw_only=True)
class _Outside:
    """The first rank's look at names and sizes."""

    has_manifest: bool = False
    damage: str | None = None


def _look_from_outside(checkpoint: Path) -> _Outside:
    has_manifest = (checkpoint / MANIFEST).is_file()
    return _Outside(has_manifest=has_manifest, damage=_damage(lambda: _require_outside(checkpoint, has_manifest)))


def _damage(check: Callable[[], None]) -> str | None:
    try:
        check()
    except DamageError as error:
        return str(error)
    return None


def _require_outside(checkpoint: Path, has_manifest: bool) -> None:
    """Require the manifest, and names and sizes of the files."""
    if has_manifest:
        require_files(checkpoint, read_manifest(checkpoint), lambda name: _READ.fullmatch(name) is not None)
    elif _read_state(checkpoint).get(HAS_MANIFEST):
        raise DamageError(f"{MANIFEST}: is missing")
    else:
        log.warning(
            "%s: has no %s, since an earlier version wrote it: its files are not verified", checkpoint, MANIFEST
        )


def _read_state(checkpoint: Path) -> dict[str, Any]:
    try:
        state = json.loads((checkpoint / STATE).read_bytes())
    except FileNotFoundError as error:
        raise DamageError(f"{STATE}: is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DamageError(f"{STATE}: cannot be read: {str(error)[:100]}") from error
    if not isinstance(state, dict):
        raise DamageError(f"{STATE}: is no mapping")
    return state


def _require_share(checkpoint: Path, verify: Verify, readers: Readers, show_progress: bool) -> None:
    """Require the checksums of this rank's share."""
    records = read_manifest(checkpoint)
    blocks = [block for block in blocks_of(records) if verify == "full" or not block.name.endswith(_TENSORS)]
    own = blocks[readers.rank :: readers.count]
    total, shown = sum(block.length for block in own), show_progress and readers.is_first
    with progress(total, f"verify {checkpoint.name}", "bytes", enabled=shown) as bar:
        require_blocks(checkpoint, own, bar.update)
