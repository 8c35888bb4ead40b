"""The places of the rows in a JSONL file, and the digests of files, kept so that one process reads the whole file.

Each replica's leader opens the prompt files. The first one reads them from beginning to end; the others, and every
later run in the same folder, read an index of 8 bytes a row.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_dypo.data.array_files import read_arrays, write_arrays

_SETTLED_S = 2.0
"""A file that changed within this time gets no index: a file system may give the next change the same time."""
_VERSION = 1
"""Version of the index. Increase it when the same file gets another one."""
_NAMES = ("offsets", "lines", "is_open_ended", "sha256")


@dataclass(frozen=True, kw_only=True, eq=False)
class FileIndex:
    """The index of one file with N rows. Of a Parquet file it has the digest alone (N = 0)."""

    offsets: npt.NDArray[np.int64]
    """[N+1] Byte at which each row begins, and the end of the file. A row ends before the next one; blank lines belong
    to the row before."""
    lines: npt.NDArray[np.uint32]
    """[N] 1-based line of each row; [0] if each line has a row."""
    is_open_ended: bool
    """Whether the last line ends without a line break."""
    sha256: str = ""
    """Digest of the whole file, in hexadecimal; '' if it is not known."""


def only_digest(size: int) -> FileIndex:
    """Return the index of a file of ``size`` bytes without rows of its own, for its digest."""
    return FileIndex(offsets=np.array([size], np.int64), lines=np.zeros(0, np.uint32), is_open_ended=False)


class IndexFiles:
    """The index files of a folder; None: there are none, and none is written.

    The name of an index contains a hash of the data file's path, inode, size and times. A change of its content changes
    the time of the last change of the inode, which no program can set.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._found: dict[str, FileIndex | None] = {}

    def key(self, path: Path, descriptor: int) -> str:
        """Return the key of a file in its present state."""
        stat = os.fstat(descriptor)
        state = (_VERSION, str(path.absolute()), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        return hashlib.sha256(repr(state).encode()).hexdigest()[:32]

    def find(self, path: Path, descriptor: int) -> FileIndex | None:
        """Return the index of an open file; None if it has none, or (with a warning) a damaged one."""
        if self._folder is None:
            return None
        key = self.key(path, descriptor)
        if key not in self._found:
            self._found[key] = _read(self._file(key), os.fstat(descriptor).st_size)
        return self._found[key]

    def keep(self, path: Path, descriptor: int, index: FileIndex, key: str) -> None:
        """Write the index of an open file, unless the file has changed since it had ``key``, or just before."""
        stat = os.fstat(descriptor)
        is_settled = time.time() - max(stat.st_mtime, stat.st_ctime) >= _SETTLED_S
        if self._folder is None or not is_settled or key != self.key(path, descriptor):
            return
        arrays: dict[str, npt.NDArray[Any]] = {
            "offsets": index.offsets,
            "lines": index.lines,
            "is_open_ended": np.array(index.is_open_ended),
            "sha256": np.frombuffer(index.sha256.encode(), np.uint8),
        }
        write_arrays(self._file(key), arrays)

    def _file(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{key}.index.npz"


def _read(file: Path, size: int) -> FileIndex | None:
    arrays = read_arrays(file, _NAMES)
    if arrays is None:
        return None
    offsets, lines = arrays["offsets"], arrays["lines"]
    assert len(lines) in (0, len(offsets) - 1), f"{file}: {len(lines)} lines for {len(offsets) - 1} rows"
    assert offsets[-1] == size, f"{file}: rows end at {offsets[-1]}, the file at {size}"
    return FileIndex(
        offsets=offsets,
        lines=lines,
        is_open_ended=bool(arrays["is_open_ended"]),
        sha256=arrays["sha256"].tobytes().decode(),
    )
