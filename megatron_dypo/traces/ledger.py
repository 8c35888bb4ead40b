"""The responses of one teacher: a line of a file for each, and their totals for each task in memory."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_dypo.eval.locked_lines import LockedLines, parse_line
from megatron_dypo.json_text import parse_json
from megatron_dypo.metrics.names import name_part
from megatron_dypo.metrics.progress import progress
from megatron_dypo.traces.config import TeacherConfig
from megatron_dypo.traces.tasks import Tasks


@dataclass(frozen=True, kw_only=True)
class TraceRecord:
    """One response of a teacher, or its endpoint's final refusal to give one."""

    key: str
    """Hash of prompt and answer, in hexadecimal."""
    id: str
    """Id of the first row with this prompt."""
    sample: int
    """Number of the response among those to the prompt, from 0."""
    correct: bool | None
    """None: there is no verdict, and ``error`` says why."""
    truncated: bool
    """Whether the response hit the length limit. If so, it is neither judged nor kept."""
    refused: bool
    """Whether the endpoint refuses this prompt for good. If so, there is no response."""
    num_tokens: int
    num_prompt_tokens: int
    response: str
    error: str | None = None


@dataclass(kw_only=True)
class Counts:
    """Counts of one teacher's responses, over all calls of the program."""

    asked: int = 0
    right: int = 0
    wrong: int = 0
    truncated: int = 0
    no_verdict: int = 0
    refused: int = 0
    duplicates: int = 0
    """Right responses with the text of a response that is kept already."""
    num_tokens: int = 0
    num_prompt_tokens: int = 0


class Ledger:
    """The responses of one teacher on disk, and some bytes for each task in memory. It is a context manager.

    Args:
        folder: folder of the records; this teacher's are in ``<name>.jsonl``.
        setting: everything that decides responses and verdicts; records of another setting are refused.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        cfg: TeacherConfig,
        tasks: Tasks,
        setting: Mapping[str, Any],
        *,
        show_progress: bool = False,
    ) -> None:
        self._show_progress = show_progress
        self.name, self.cfg, self._tasks = name, cfg, tasks
        part = name_part(name)
        self._lines = LockedLines(folder / f"{part}.jsonl", folder / f"{part}.setting.json", setting)
        shape = (len(tasks), cfg.keep)
        self._asked = np.zeros(len(tasks), np.uint16)
        self._refused = np.zeros(len(tasks), np.bool_)
        self._num_kept = np.zeros(len(tasks), np.uint8)
        self._offsets = np.zeros(shape, np.int64)
        self._hashes = np.zeros(shape, np.uint64)
        self._lengths = np.zeros(shape, np.int32)
        self._lacking = tasks.lacking(name)
        self.counts = Counts()
        self.num_foreign = 0
        """Records of prompts that the prompt file does not have."""

    def __enter__(self) -> Ledger:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._lines)
            self._read()
            stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lines.close()

    def _read(self) -> None:
        path, offset = self._lines.path, 0
        with (
            path.open("rb") as file,
            progress(path.stat().st_size, f"records of {self.name}", "bytes", enabled=self._show_progress) as bar,
        ):
            for number, line in enumerate(file, start=1):
                self._note(parse_line(line, f"{path}:{number}", TraceRecord), offset)
                offset += len(line)
                bar.update(len(line))

    @property
    def has_trace(self) -> npt.NDArray[np.bool_]:
        """Return for each task whether the teacher got it right."""
        return self._num_kept > 0

    @property
    def was_asked(self) -> npt.NDArray[np.bool_]:
        """Return for each task whether there is a response to it."""
        return (self._asked > 0) & ~self._refused

    @property
    def kept_lengths(self) -> npt.NDArray[np.int32]:
        """Return the tokens of each response that is kept."""
        return self._lengths[np.arange(self.cfg.keep) < self._num_kept[:, None]]

    @property
    def num_left(self) -> int:
        """Return the number of tasks that are not done."""
        return int(np.count_nonzero(~self._done()))

    def is_done(self, task: int) -> bool:
        """Return whether nothing is left to ask about a task."""
        return bool(self._done(task))

    def next_sample(self, task: int) -> int:
        """Return the number of the next response to a task."""
        return int(self._asked[task])

    def append(self, records: Sequence[TraceRecord]) -> None:
        """Add records. They are on disk when this returns."""
        offsets = self._lines.append([vars(record) for record in records])
        for record, offset in zip(records, offsets, strict=True):
            self._note(record, offset)

    def kept(self, task: int) -> list[str]:
        """Return the responses to a task that are kept, in the order in which they came."""
        if not self._num_kept[task]:
            return []
        with self._lines.path.open("rb") as file:
            texts = []
            for offset in self._offsets[task][: self._num_kept[task]]:
                file.seek(int(offset))
                texts.append(str(parse_json(file.readline())["response"]))
        return texts

    def _done(self, at: int | slice = slice(None)) -> Any:
        """Return whether the task at a number is done; for a slice, an array."""
        enough = (self._asked[at] >= self.cfg.samples) | (self._num_kept[at] >= self.cfg.keep)
        return enough | self._refused[at] | ~self._lacking[at]

    def _note(self, record: TraceRecord, offset: int) -> None:
        try:
            key = bytes.fromhex(record.key)
        except ValueError as error:
            raise ValueError(f"{self._lines.path}: key={record.key!r:.80}: must be hexadecimal") from error
        task = self._tasks.find(key)
        if task is None:
            self.num_foreign += 1
            return
        counts = self.counts
        self._asked[task] += 1
        counts.num_tokens += record.num_tokens
        counts.num_prompt_tokens += record.num_prompt_tokens
        counts.asked += 1
        if record.refused:
            self._refused[task] = True
            counts.refused += 1
        elif record.truncated:
            counts.truncated += 1
        elif record.correct is None:
            counts.no_verdict += 1
        elif not record.correct:
            counts.wrong += 1
        else:
            counts.right += 1
            self._keep(task, record, offset)

    def _keep(self, task: int, record: TraceRecord, offset: int) -> None:
        place, digest = int(self._num_kept[task]), text_hash(record.response)
        if digest in self._hashes[task][:place]:
            self.counts.duplicates += 1
        elif place < self.cfg.keep:
            self._offsets[task, place], self._hashes[task, place] = offset, digest
            self._lengths[task, place] = record.num_tokens
            self._num_kept[task] += 1


def text_hash(text: str) -> np.uint64:
    """Return a hash of a text; texts that differ only in white space have the same hash."""
    plain = " ".join(text.split()).encode("utf-8", "backslashreplace")
    return np.uint64(int.from_bytes(hashlib.sha256(plain).digest()[:8], "big"))
