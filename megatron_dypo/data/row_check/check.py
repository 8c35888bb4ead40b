"""The check of all rows at opening: each is parsed, rendered and tokenised once, and the facts about it are kept."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_dypo.config.data import DataConfig
from megatron_dypo.data.files import RowPart
from megatron_dypo.data.rows import BadRow, PromptRow
from megatron_dypo.data.source import RowParser, RowSource
from megatron_dypo.data.tokenising import end_trace, render_prompt, require_target
from megatron_dypo.data.tokenizer.open import Tokenizer
from megatron_dypo.data.values import has_field, printable


@dataclass(frozen=True, kw_only=True, eq=False)
class RowsChecked:
    """The facts about N rows with M traces, kept so that the rows need not be read again."""

    prompt_tokens: npt.NDArray[np.int32]
    """[N] Tokens of the prompt; −1 if they were not counted (a bad row, or a check without a tokenizer)."""
    trace_start: npt.NDArray[np.int64]
    """[N+1] Index of each row's first trace. The row's traces end before the next row's first."""
    trace_teacher: npt.NDArray[np.int32]
    """[M] Index into ``teachers``."""
    trace_tokens: npt.NDArray[np.int32]
    """[M] Tokens of the trace as a target, end-of-sequence included; −1 if they were not counted."""
    teachers: tuple[str, ...]
    """Names of the teachers, in alphabetical order."""
    verifier: npt.NDArray[np.int32]
    """[N] Index into ``verifiers``; −1 if the row names none."""
    verifiers: tuple[str, ...]
    source: npt.NDArray[np.int32]
    """[N] Index into ``sources``; −1 for a bad row."""
    sources: tuple[str, ...]
    is_object: npt.NDArray[np.bool_]
    """[N] Whether the answer is an object or a list."""
    columns: tuple[str, ...]
    """Names of :class:`Columns` that some row has, even if the value is null."""
    num_failed_checks: int
    """Number of traces left out because of ``data.fields.trace_checks``."""
    problems: Mapping[int, Sequence[str]]
    """Bad rows → the rules that they break."""


class PartCheck:
    """The findings of the check of one part. They can be sent between processes."""

    def __init__(self) -> None:
        self.prompt_tokens, self.num_traces, self.trace_tokens = array("i"), array("i"), array("i")
        self.trace_teacher, self.verifier, self.source = array("i"), array("i"), array("i")
        self.names: dict[str, int] = {}
        """Names of teachers, verifiers and sources → their index in this part."""
        self.columns: set[str] = set()
        self.is_object = array("b")
        self.digests = array("Q")
        self.num_failed_checks = 0
        self.problems: dict[int, tuple[str, ...]] = {}

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    def add(self, row: PromptRow, prompt_tokens: int, trace_tokens: Mapping[str, int]) -> None:
        """Note a good row."""
        self.prompt_tokens.append(prompt_tokens)
        self.num_traces.append(len(trace_tokens))
        self.trace_tokens.extend(trace_tokens.values())
        self.trace_teacher.extend(self._index(name) for name in trace_tokens)
        self.verifier.append(-1 if row.verifier is None else self._index(row.verifier))
        self.source.append(self._index(row.source))
        self.is_object.append(not isinstance(row.answer, str))
        self.digests.append(_digest(row.prompt_id))
        self.num_failed_checks += row.num_failed_checks

    def add_bad(self, bad: BadRow) -> None:
        """Note a bad row."""
        self.problems[len(self)] = bad.problems
        self.prompt_tokens.append(-1)
        self.num_traces.append(0)
        self.verifier.append(-1)
        self.source.append(-1)
        self.is_object.append(False)
        self.digests.append(0)

    def note_columns(self, record: object, columns: Sequence[str]) -> None:
        """Note which of these columns a record has."""
        for name in columns:
            if name not in self.columns and isinstance(record, dict) and has_field(record, name):
                self.columns.add(name)

    def _index(self, name: str) -> int:
        return self.names.setdefault(name, len(self.names))


def check_part(
    part: RowPart,
    parser: RowParser,
    tokenizer: Tokenizer | None,
    data: DataConfig,
    on_row: Callable[[int], object] | None = None,
) -> PartCheck:
    """Check the rows of a part. After each row ``on_row`` is called with 1."""
    found = PartCheck()
    for line, record in zip(part.lines, part.scan(), strict=True):
        try:
            if isinstance(record, BadRow):
                raise record
            found.note_columns(record, parser.columns.names)
            row = parser.parse(line, record)
            if tokenizer is None:
                found.add(row, -1, dict.fromkeys(row.traces, -1))
            else:
                found.add(row, *_count(row, tokenizer, data))
        except BadRow as bad:
            found.add_bad(bad)
        if on_row is not None:
            on_row(1)
    return found


def _count(row: PromptRow, tokenizer: Tokenizer, data: DataConfig) -> tuple[int, dict[str, int]]:
    try:
        prompt = render_prompt(row.prompt, tokenizer, data)
    except ValueError as error:
        raise BadRow(f"prompt: {printable(str(error))}") from error
    counts, problems = {}, []
    for name, text in row.traces.items():
        try:
            target = end_trace(text, tokenizer, prompt)
            require_target(target, tokenizer)
        except ValueError as error:
            problems.append(f"the trace of {name!r}: {printable(str(error))}")
        else:
            counts[name] = len(target)
    if problems:
        raise BadRow(*problems)
    return len(prompt), counts


def join_parts(parts: Sequence[PartCheck], source: RowSource) -> RowsChecked:
    """Join the checks of all parts, in the order of the rows. A row with the id of an earlier row becomes bad."""
    teachers = sorted({name for part in parts for name in _used(part, part.trace_teacher)})
    verifiers = sorted({name for part in parts for name in _used(part, part.verifier)})
    sources = sorted({name for part in parts for name in _used(part, part.source)})
    problems: dict[int, tuple[str, ...]] = {}
    first = 0
    for part in parts:
        problems |= {first + index: found for index, found in part.problems.items()}
        first += len(part)
    problems |= _repeated_ids(_joined([part.digests for part in parts], np.uint64), set(problems), source)
    num_traces = _joined([part.num_traces for part in parts], np.int64)
    return RowsChecked(
        prompt_tokens=_joined([part.prompt_tokens for part in parts], np.int32),
        trace_start=np.concatenate([[0], np.cumsum(num_traces)]).astype(np.int64),
        trace_teacher=_joined([_renumbered(part, part.trace_teacher, teachers) for part in parts], np.int32),
        trace_tokens=_joined([part.trace_tokens for part in parts], np.int32),
        teachers=tuple(teachers),
        verifier=_joined([_renumbered(part, part.verifier, verifiers) for part in parts], np.int32),
        verifiers=tuple(verifiers),
        source=_joined([_renumbered(part, part.source, sources) for part in parts], np.int32),
        sources=tuple(sources),
        columns=tuple(sorted({name for part in parts for name in part.columns})),
        is_object=_joined([part.is_object for part in parts], np.bool_),
        num_failed_checks=sum(part.num_failed_checks for part in parts),
        problems=dict(sorted(problems.items())),
    )


def _used(part: PartCheck, indices: array[int]) -> list[str]:
    names = list(part.names)
    return [names[index] for index in set(indices) if index >= 0]


def _renumbered(part: PartCheck, indices: array[int], names: Sequence[str]) -> npt.NDArray[np.int32]:
    """Return indices into ``names`` for indices into the part's own names; −1 stays."""
    index_of = {name: index for index, name in enumerate(names)}
    table = np.array([*(index_of.get(name, -1) for name in part.names), -1], np.int32)
    return table[np.asarray(indices, np.int64)]


def _joined(parts: Sequence[Any], kind: type) -> npt.NDArray[Any]:
    return np.concatenate([np.zeros(0, kind), *(np.asarray(part, kind) for part in parts)])


def _repeated_ids(digests: npt.NDArray[np.uint64], bad: set[int], source: RowSource) -> dict[int, tuple[str, ...]]:
    order = np.argsort(digests, kind="stable")
    order = order[~np.isin(order, list(bad))] if bad else order
    is_next = digests[order[1:]] == digests[order[:-1]]
    # Runs of equal digests; rows are in their order within a run. A run begins where a row equals only the next one.
    edges = np.diff(np.concatenate([[False], is_next, [False]]).astype(np.int8))
    runs = zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist(), strict=True)
    problems: dict[int, tuple[str, ...]] = {}
    for first, last in runs:
        problems |= _equal_ids(order[first : last + 1].tolist(), source)
    return problems


def _equal_ids(rows: Sequence[int], source: RowSource) -> dict[int, tuple[str, ...]]:
    first_of: dict[str, int] = {}
    problems: dict[int, tuple[str, ...]] = {}
    for row in rows:
        prompt_id = source.row(row).prompt_id
        first = first_of.setdefault(prompt_id, row)
        if first != row:
            problems[row] = (f"{source.columns.id or 'id'}={prompt_id!r}: is the id of {source.place(first)} too",)
    return problems


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
