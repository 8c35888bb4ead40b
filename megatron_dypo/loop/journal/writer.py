"""The files of one journal that are written: one grows up to a limit, and a new one takes the place of all before."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from megatron_dypo.fs import new_file, remove
from megatron_dypo.loop.journal.found import number_of, segment_of, segments
from megatron_dypo.loop.journal.segment import Place, append

log = logging.getLogger("megatron_dypo")


class SegmentWriter:
    """Appends records to a new file of ``folder``. Any thread may call its methods.

    A file system that is full, or broken, ends the journal and not the run: a warning says so, and the next
    :meth:`renew` tries again.

    Args:
        start: the first record of each file.
        limit_bytes: size of all files of the folder together above which nothing is appended.
    """

    def __init__(self, folder: Path, *, start: bytes, limit_bytes: int) -> None:
        self.folder, self._start, self._limit = folder, start, limit_bytes
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        self._is_full = False
        folder.mkdir(parents=True, exist_ok=True)
        old = segments(folder)
        self._others = sum(path.stat().st_size for path in old)
        self._path = segment_of(folder, number_of(old[-1]) + 1 if old else 0)
        self._size = self._count = 0
        with self._lock:
            self._open([start])

    @property
    def size(self) -> int:
        """Bytes of all files of the folder."""
        return self._others + self._size

    def append(self, payload: bytes) -> Place | None:
        """Append a record; return its place, or None if it was not written."""
        with self._lock:
            if self._file is None or self._is_full:
                return None
            if self.size + len(payload) > self._limit:
                self._is_full = True
                log.warning(
                    "%s: the journal of rollouts has reached rollout.journal_mib=%d: until the next checkpoint, groups "
                    "are not added to it, and a resume would make them again",
                    *(self.folder, self._limit // 2**20),
                )
                return None
            try:
                return self._append(self._file, payload)
            except OSError as error:
                self._end(error)
                return None

    def renew(self, payloads: Sequence[bytes]) -> list[Place] | None:
        """Begin a new file that holds only ``payloads``, and remove all others; return their places.

        The new file appears whole before the first old one goes, and each goes at once. None: it cannot be written, and
        the old files stay.
        """
        with self._lock:
            old = segments(self.folder)
            self._close_file()
            self._path = segment_of(self.folder, number_of(old[-1]) + 1 if old else 0)
            self._others, self._is_full = sum(path.stat().st_size for path in old), False
            places = self._open([self._start, *payloads])
            if places is None:
                return None
            for path in old:
                remove(path)
            self._others = 0
            return places[1:]

    def close(self) -> None:
        """Close the file; later records are not written."""
        with self._lock:
            self._close_file()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _open(self, payloads: Sequence[bytes]) -> list[Place] | None:
        """Write a new file that begins with these records, and go on with it."""
        self._size = self._count = 0
        try:
            with new_file(self._path, durable=False) as file:
                places = [self._append(file, payload) for payload in payloads]
            self._file = self._path.open("ab", buffering=0)
        except OSError as error:
            self._end(error)
            return None
        return places

    def _append(self, file: BinaryIO, payload: bytes) -> Place:
        size = append(file, self._count, payload)
        place = Place(path=self._path, number=self._count, start=self._size, size=size)
        self._size, self._count = self._size + size, self._count + 1
        return place

    def _end(self, error: OSError) -> None:
        log.warning(
            "%s: the journal of rollouts cannot be written, so a resume before the next checkpoint would make groups "
            "again: %s",
            *(self.folder, error),
        )
        self._close_file()
