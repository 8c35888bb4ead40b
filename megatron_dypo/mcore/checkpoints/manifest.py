"""The manifest of a checkpoint: every file with its size and checksums, written last.

The checksum is CRC-32 of the standard library. It finds every change of up to 32 adjacent bits, and of other damage all
but one in four billion; it is no protection against an attacker, for whom nothing in a checkpoint is executed
(:mod:`megatron_dypo.mcore.compat.restricted_pickle`). Large files have one checksum for each block, so that ranks share
the reading of a file.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dypo.fs import durable_file
from megatron_dypo.json_text import parse_json

MANIFEST = "manifest.json"
BLOCK_BYTES = 64 * 2**20
"""Bytes under one checksum. 5 TB have 80,000 blocks, whose manifest has about 2 MB. A manifest with another size of
blocks counts as damaged: whoever changes this has to read ``block_bytes`` from the file."""
_PIECE_BYTES = 2**20
_THREADS = 4
"""Readers of one rank. CRC-32 releases the interpreter's lock and runs at about 1.5 GB/s."""


class DamageError(ValueError):
    """The damage of a checkpoint: the name of a file, relative to the checkpoint, and the reason."""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file as it was written."""

    size: int
    crc32: tuple[str, ...]
    """Checksum of each block, eight hexadecimal digits."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A part of a file that has a checksum of its own."""

    name: str
    start: int
    length: int
    crc32: str


def record_files(folder: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Read files of a folder and return their records. ``names`` are relative to ``folder``."""
    records = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for name in names:
            path = folder / name
            size = path.stat().st_size
            starts = range(0, size, BLOCK_BYTES)
            sums = pool.map(lambda start, path=path: _checksum(path, start, BLOCK_BYTES), starts)
            records[name] = FileRecord(size=size, crc32=tuple(sums))
    return records


def _checksum(path: Path, start: int, length: int) -> str:
    value, buffer = 0, memoryview(bytearray(_PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while length > 0 and (count := file.readinto(buffer[: min(length, _PIECE_BYTES)])):
            value = zlib.crc32(buffer[:count], value)
            length -= count
    return f"{value:08x}"


def write_manifest(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """Write the manifest of a folder that holds exactly these files."""
    with durable_file(folder / MANIFEST) as file:
        file.write(_text(records).encode())


def _text(records: Mapping[str, FileRecord]) -> str:
    """Return the one text that a manifest of these files can have: any change of the file differs from it."""
    files = {name: {"size": one.size, "crc32": one.crc32} for name, one in sorted(records.items())}
    content = {"block_bytes": BLOCK_BYTES, "files": files}
    seal = f"{zlib.crc32(json.dumps(content).encode()):08x}"
    return json.dumps({**content, "crc32": seal}, indent=1)


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """Return the records of a checkpoint's files, by name.

    Raises:
        DamageError: the manifest cannot be read, or is not as it was written.
    """
    try:
        text = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise DamageError(f"{MANIFEST}: {_reason(error)}") from error
    try:
        records = {name: _record(one) for name, one in parse_json(text)["files"].items()}
        is_as_written = _text(records).encode() == text
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamageError(f"{MANIFEST}: is no manifest: {type(error).__name__}: {str(error)[:100]}") from error
    if not is_as_written:
        raise DamageError(f"{MANIFEST}: does not match its own checksum")
    return records


def _record(value: Any) -> FileRecord:
    return FileRecord(size=value["size"], crc32=tuple(value["crc32"]))


def require_files(
    folder: Path,
    records: Mapping[str, FileRecord],
    is_read: Callable[[str], bool],
    is_needed: Callable[[str], bool] = lambda _: True,
) -> None:
    """Require every recorded file with its size, and no other file that would be read.

    A file that is not needed may be missing.

    Raises:
        DamageError: it names the first wrong file.
    """
    found = list_files(folder)
    for name, one in records.items():
        if name not in found and is_needed(name):
            raise DamageError(f"{name}: is missing")
        if found.get(name, one.size) != one.size:
            raise DamageError(f"{name}: has {found[name]} bytes, {one.size} were written")
    stray = sorted(name for name in found if name not in records and name != MANIFEST and is_read(name))
    if stray:
        raise DamageError(f"{stray[0]}: is not a file of this checkpoint")


def list_files(folder: Path) -> dict[str, int]:
    """Return name → size of every file in a folder and its sub-folders. A dangling link is none."""
    found = {}
    for path, _, names in os.walk(folder):
        for name in names:
            file = Path(path) / name
            if file.is_file():
                found[file.relative_to(folder).as_posix()] = file.stat().st_size
    return found


def blocks_of(records: Mapping[str, FileRecord]) -> list[Block]:
    """Return the blocks of the files, in order."""
    return [
        Block(name=name, start=start, length=min(BLOCK_BYTES, one.size - start), crc32=crc32)
        for name, one in records.items()
        for start, crc32 in zip(range(0, one.size, BLOCK_BYTES), one.crc32, strict=True)
    ]


def require_blocks(folder: Path, blocks: Iterable[Block], done: Callable[[int], object] = lambda _: None) -> None:
    """Read blocks, and require the bytes that were written. ``done`` is told the length of each.

    Raises:
        DamageError: it names the first wrong block.
    """

    def check(block: Block) -> Block | DamageError:
        try:
            found = _checksum(folder / block.name, block.start, block.length)
        except OSError as error:
            return DamageError(f"{block.name}: {_reason(error)}")
        end = block.start + block.length - 1
        wrong = f"{block.name}: bytes {block.start} to {end} are not those that were written (CRC-32 {found}, "
        return block if found == block.crc32 else DamageError(f"{wrong}manifest {block.crc32})")

    with ThreadPoolExecutor(_THREADS) as pool:
        for outcome in pool.map(check, blocks):
            if isinstance(outcome, DamageError):
                pool.shutdown(wait=False, cancel_futures=True)
                raise outcome
            done(outcome.length)


def _reason(error: OSError) -> str:
    return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
