"""The rows of the prompt files. All are checked once at opening; each is read again when it is used."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_dypo.config.data import DataConfig, DataFieldsConfig
from megatron_dypo.config.words import counted
from megatron_dypo.data.formats import columns_of
from megatron_dypo.data.row_check.bad_rows import settle_bad_rows
from megatron_dypo.data.row_check.cache import CHECK_FOLDER, check_hash, read_check, write_check
from megatron_dypo.data.row_check.check import RowsChecked
from megatron_dypo.data.row_check.processes import check_rows
from megatron_dypo.data.rows import PromptRow
from megatron_dypo.data.source import RowSource
from megatron_dypo.data.tokenizer.open import Tokenizer
from megatron_dypo.data.values import shown

log = logging.getLogger(__name__)


class PromptDataset:
    """Rows of JSONL and Parquet files by index. Every row is checked at opening, and read again when it is used.

    With a tokenizer the check also renders and counts each row. Only a few bytes for each row are kept in memory. Bad
    rows raise one ValueError that lists the first 20, each with file, line, field, value and rule, and counts the rest.
    Duplicate ids are bad rows too. With ``data.on_bad_row=skip`` bad rows are left out instead.
    """

    def __init__(
        self,
        paths: Iterable[Path | str],
        fields: DataFieldsConfig | None = None,
        *,
        data: DataConfig | None = None,
        tokenizer: Tokenizer | None = None,
        cache_dir: Path | None = None,
        show_progress: bool = False,
        held_out: bool = False,
    ) -> None:
        data = data or DataConfig(fields=fields or DataFieldsConfig())
        columns = columns_of(data.format, data.fields)
        if held_out:
            columns = dataclasses.replace(columns, traces=(), trace_checks=())
        self._source = RowSource(
            paths,
            columns,
            keep_row=data.keep_row,
            show_progress=show_progress,
            index_folder=None if cache_dir is None else cache_dir / CHECK_FOLDER,
        )
        self.check_file: Path | None = None
        """The file with the check's result, for a later opening."""
        self.checked = self._check(data, tokenizer, cache_dir, show_progress)
        """The result of the row check, bad rows included; ``numbers`` are the indices of the good rows."""
        settle_bad_rows(self.checked.problems, self._source, data.on_bad_row, cache_dir)
        index = np.int32 if len(self._source) < 2**31 else np.int64
        self.numbers: npt.NDArray[np.signedinteger] = np.delete(
            np.arange(len(self._source), dtype=index), list(self.checked.problems)
        )
        self.teachers: frozenset[str] = frozenset(self.checked.teachers)
        """Every teacher that some row has."""
        self.verifiers: frozenset[str] = frozenset(self.checked.verifiers)
        """Every verifier that some row names."""
        self.sources: frozenset[str] = frozenset(self.checked.sources)
        self.num_skipped = len(self.checked.problems)
        """Bad rows that are left out."""
        self.num_too_long = 0
        """Prompts longer than ``data.max_prompt_tokens``; their draws are dropped."""
        if not held_out:
            self._require_named_columns(data.fields)
        if tokenizer is not None:
            self._settle_prompts(data)
            self._settle_traces(data)

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[PromptRow]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> PromptRow:
        """Return the row at ``row``, 0 ≤ row < len. Rows are in the order of files and lines."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self._source.row(int(self.numbers[row]))

    def prompt_tokens(self, row: int) -> int | None:
        """Return the number of tokens of a row's prompt; None if the data set was opened without a tokenizer."""
        count = int(self.checked.prompt_tokens[self.numbers[row]])
        return count if count >= 0 else None

    def trace_indices(self, row: int) -> dict[str, int]:
        """Return teacher name → index into the check's arrays of traces, for the teachers of a row."""
        start, stop = self.checked.trace_start[self.numbers[row] : self.numbers[row] + 2]
        return {self.checked.teachers[self.checked.trace_teacher[index]]: index for index in range(start, stop)}

    def require_text_answers(self, takes_objects: Callable[[str | None, str], bool]) -> None:
        """Raise ValueError if an answer is an object or a list and the row's verifier takes only text.

        ``takes_objects`` gets a row's own verifier (or None) and its source. It is called once for each such pair among
        rows with objects or lists as answers.
        """
        checked = self.checked
        with_object = self.numbers[checked.is_object[self.numbers]]
        kinds = np.stack([checked.verifier[with_object], checked.source[with_object]], axis=1)
        for code, source in np.unique(kinds, axis=0):
            verifier = None if code < 0 else checked.verifiers[code]
            if takes_objects(verifier, checked.sources[source]):
                continue
            rows = with_object[(kinds == (code, source)).all(axis=1)]
            answer = shown(self._source.row(int(rows[0])).answer)
            raise ValueError(
                f"{self._source.place(int(rows[0]))}: {self._source.columns.answer}={answer}: "
                f"{verifier or 'the verifier'} takes text only; {counted(len(rows), 'row')} with an object or "
                "a list there"
            )

    def fingerprint(self) -> list[dict[str, Any]]:
        """Describe each file: name, bytes, rows, SHA-256, and the number and identity of its skipped rows."""
        files, first = [], 0
        source = self._source
        bad = np.fromiter(self.checked.problems, np.int64)
        for file, name, size, digest in zip(source.files, source.names, source.sizes, source.hashes, strict=True):
            inside = bad[(bad >= first) & (bad < first + len(file))] - first
            files.append(
                {
                    "name": name,
                    "bytes": size,
                    "rows": len(file),
                    "sha256": digest,
                    "skipped": len(inside),
                    "skipped_sha256": hashlib.sha256(inside.astype("<i8").tobytes()).hexdigest(),
                }
            )
            first += len(file)
        return files

    def close(self) -> None:
        self._source.close()

    def _check(
        self, data: DataConfig, tokenizer: Tokenizer | None, cache_dir: Path | None, show_progress: bool
    ) -> RowsChecked:
        if tokenizer is None or cache_dir is None:
            return check_rows(self._source, tokenizer, data, show_progress=show_progress)
        self.check_file = cache_dir / CHECK_FOLDER / f"{check_hash(self._source, tokenizer, data)}.npz"
        checked = read_check(self.check_file)
        if checked is None:
            checked = check_rows(self._source, tokenizer, data, show_progress=show_progress)
            write_check(self.check_file, checked)
        return checked

    def _require_named_columns(self, fields: DataFieldsConfig) -> None:
        """Raise ValueError if the config names a column that no row has, which is probably a typing error."""
        for option in dataclasses.fields(fields):
            value = getattr(fields, option.name)
            for name in (value,) if isinstance(value, str) else value or ():
                if name and name not in self.checked.columns:
                    raise ValueError(f"data.fields.{option.name}={name}: no row of the prompt files has such a field")

    def _settle_prompts(self, data: DataConfig) -> None:
        lengths = self.checked.prompt_tokens[self.numbers]
        self.num_too_long = int((lengths > data.max_prompt_tokens).sum())
        if not self.num_too_long:
            return
        limit = f"data.max_prompt_tokens={data.max_prompt_tokens}"
        text = f"{self.num_too_long} of {len(self)} prompts are longer than {limit}"
        if self.num_too_long == len(self):
            raise ValueError(f"{text}: the shortest has {lengths.min()} tokens")
        log.warning("%s: their draws are dropped; the longest has %d tokens", text, lengths.max())

    def _settle_traces(self, data: DataConfig) -> None:
        if self.checked.num_failed_checks:
            log.warning(
                "%s failed a check of data.fields.trace_checks", counted(self.checked.num_failed_checks, "trace")
            )
        num_long = int((self.checked.trace_tokens > data.max_trace_tokens).sum())
        if num_long:
            text = "%d of %d teachers' traces are longer than data.max_trace_tokens=%d and dropped"
            log.warning(text, num_long, len(self.checked.trace_tokens), data.max_trace_tokens)


def open_prompts(
    paths: Iterable[Path | str],
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    cache_dir: Path | None = None,
    show_progress: bool = False,
    held_out: bool = False,
) -> PromptDataset:
    """Open prompt files and check every row once: parsed, rendered with its template and tokenised.

    The result of the check is stored in ``cache_dir / "data_check"``. A second opening of the same files with the same
    tokenizer and template reads it. Bad rows are listed in ``cache_dir / "bad_rows.jsonl"``. For an evaluation set
    (``held_out``) traces are not read, and columns that ``data.fields`` names may be missing. Raises ValueError like
    :class:`PromptDataset`, and if every prompt is longer than ``data.max_prompt_tokens`` or no row has a column that
    ``data.fields`` names.
    """
    return PromptDataset(
        paths,
        data=data,
        tokenizer=tokenizer,
        cache_dir=cache_dir,
        show_progress=show_progress,
        held_out=held_out,
    )
