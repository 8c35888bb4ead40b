"""The verification of a checkpoint against its manifest, shared by the ranks that will load it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from megatron_dypo.json_text import parse_json
from megatron_dypo.mcore.checkpoints.folder import STATE
from megatron_dypo.mcore.checkpoints.manifest import (
    MANIFEST,
    Block,
    DamageError,
    blocks_of,
    read_manifest,
    require_blocks,
    require_files,
)
from megatron_dypo.mcore.checkpoints.torch_dist import HF_FOLDER
from megatron_dypo.metrics.progress import progress
from megatron_dypo.parallel.collectives import gather_world

Verify = Literal["manifest", "full"]
"""``manifest``: names and sizes of all files, and checksums of all but the tensor files. ``full``: all checksums."""
HAS_MANIFEST = "has_manifest"
"""Key of ``trainer_state.json`` in a checkpoint that was written with a manifest."""

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


def all_ranks() -> Readers:
    """Return the ranks of the world, which verify a checkpoint together."""
    return Readers(rank=dist.get_rank(), count=dist.get_world_size(), gather=gather_world)


def find_damage(
    checkpoint: Path,
    verify: Verify,
    readers: Readers = ALONE,
    *,
    wanted: Callable[[Block], bool] | None = None,
    is_needed: Callable[[str], bool] = lambda _: True,
    show_progress: bool = False,
) -> str | None:
    """Compare a checkpoint with its manifest; return the damaged file and the reason, None if there is none.

    Collective over ``readers``: each reads its share of the files, and all return the same. A checkpoint of a version
    that wrote no manifest has nothing to be compared with.

    Args:
        wanted: the blocks whose checksums are compared, instead of those that ``verify`` chooses.
        is_needed: tells of a file's name whether it is damage if that file is missing.
    """
    outer = _look_from_outside(checkpoint, is_needed) if readers.is_first else _Outside()
    found: _Outside = readers.gather(outer)[0]
    if found.damage is not None or not found.has_manifest:
        return found.damage
    if wanted is None:
        wanted = _is_any if verify == "full" else is_small
    own = _damage(lambda: _require_share(checkpoint, wanted, readers, show_progress))
    return next((one for one in readers.gather(own) if one is not None), None)


def find_damage_of_weights(
    weights: Path, readers: Readers = ALONE, wanted: Callable[[Block], bool] | None = None
) -> str | None:
    """Return the path of the damaged file and the reason, None if the weights in a folder are whole. Collective.

    A folder that another program wrote, without a manifest, is not compared with anything. Configuration and tokenizer,
    which another folder can replace, may be missing.

    Args:
        weights: folder of the tensors: ``mcore`` or ``reference`` of a run's checkpoint, or a converted checkpoint.
        wanted: the blocks whose checksums are compared. None: all of the folder.
    """
    is_of_run = any((weights.parent / name).is_file() for name in (STATE, MANIFEST))
    checkpoint, prefix = (weights.parent, f"{weights.name}/") if is_of_run else (weights, "")
    if not is_of_run and not (weights / MANIFEST).is_file():
        return None

    def is_needed(name: str) -> bool:
        return not name.startswith(f"{prefix}{HF_FOLDER}/")

    def is_compared(block: Block) -> bool:
        is_there = is_needed(block.name) or (checkpoint / block.name).is_file()
        return is_there and (block.name.startswith(prefix) if wanted is None else wanted(block))

    damage = find_damage(checkpoint, "full", readers, wanted=is_compared, is_needed=is_needed, show_progress=True)
    return damage and f"{checkpoint}/{damage}"


def _is_any(block: Block) -> bool:
    return True


def is_small(block: Block) -> bool:
    """Tell whether a block is of a file without tensors. Such files are parsed, so they are compared first."""
    return not block.name.endswith(_TENSORS)


@dataclass(frozen=True, kw_only=True)
class _Outside:
    """The first rank's look at names and sizes."""

    has_manifest: bool = False
    damage: str | None = None


def _look_from_outside(checkpoint: Path, is_needed: Callable[[str], bool]) -> _Outside:
    has_manifest = (checkpoint / MANIFEST).is_file()
    damage = _damage(lambda: _require_outside(checkpoint, has_manifest, is_needed))
    return _Outside(has_manifest=has_manifest, damage=damage)


def _damage(check: Callable[[], None]) -> str | None:
    try:
        check()
    except DamageError as error:
        return str(error)
    return None


def _require_outside(checkpoint: Path, has_manifest: bool, is_needed: Callable[[str], bool]) -> None:
    """Require the manifest, and names and sizes of the files."""
    if has_manifest:
        records = read_manifest(checkpoint)
        require_files(checkpoint, records, lambda name: _READ.fullmatch(name) is not None, is_needed)
    elif _read_state(checkpoint).get(HAS_MANIFEST):
        raise DamageError(f"{MANIFEST}: is missing")


def _read_state(checkpoint: Path) -> dict[str, Any]:
    try:
        state = parse_json((checkpoint / STATE).read_bytes())
    except FileNotFoundError as error:
        raise DamageError(f"{STATE}: is missing") from error
    except (OSError, ValueError) as error:
        raise DamageError(f"{STATE}: cannot be read: {str(error)[:100]}") from error
    if not isinstance(state, dict):
        raise DamageError(f"{STATE}: is no mapping")
    return state


def _require_share(checkpoint: Path, wanted: Callable[[Block], bool], readers: Readers, show_progress: bool) -> None:
    """Require the checksums of this rank's share."""
    records = read_manifest(checkpoint)
    own = list(filter(wanted, blocks_of(records)))[readers.rank :: readers.count]
    total, shown = sum(block.length for block in own), show_progress and readers.is_first
    with progress(total, f"verify {checkpoint.name}", "bytes", enabled=shown) as bar:
        require_blocks(checkpoint, own, bar.update)
