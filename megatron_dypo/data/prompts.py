"""Prompts for a run: a seeded, endless stream of tokenised rows that can be divided over replicas."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_dypo.config.data import DataConfig
from megatron_dypo.data.dataset import PromptDataset, open_prompts
from megatron_dypo.data.fingerprints import compare_fingerprints
from megatron_dypo.data.row_check.verdicts import TraceVerdicts
from megatron_dypo.data.rows import PromptRow
from megatron_dypo.data.tokenising import end_trace, make_prompt, render_prompt
from megatron_dypo.data.tokenizer.open import Tokenizer
from megatron_dypo.types import Prompt, Tokens

__all__ = [
    "DropCounts",
    "PromptDataset",
    "PromptStream",
    "compare_fingerprints",
    "end_trace",
    "epoch_order",
    "open_prompts",
]


@dataclass(frozen=True, kw_only=True)
class DropCounts:
    """Counts of prompts and traces that draws dropped."""

    too_long: tuple[int, ...] = ()
    """Positions (``Prompt.order``) of prompts longer than ``max_prompt_tokens``, in ascending order."""
    traces: int = 0
    """Traces longer than ``max_trace_tokens``; their prompts are kept."""
    wrong_traces: int = 0
    """Wrong traces, with ``drop_wrong_traces``; their prompts are kept."""

    @property
    def prompts(self) -> int:
        """Prompts longer than ``max_prompt_tokens``."""
        return len(self.too_long)

    def __add__(self, other: DropCounts) -> DropCounts:
        return DropCounts(
            too_long=tuple(sorted(self.too_long + other.too_long)),
            traces=self.traces + other.traces,
            wrong_traces=self.wrong_traces + other.wrong_traces,
        )


class PromptStream:
    """The endless sequence of draws of a run. Each epoch is a permutation of the rows.

    The row at a position is a pure function of (seed, position). So a checkpoint needs only the position, and the
    sequence is the same for any number of replicas. ``verdicts``
    (:func:`megatron_dypo.data.row_check.verdicts.wrong_traces`) are needed with ``data.drop_wrong_traces`` if draws
    have traces.
    """

    def __init__(
        self,
        dataset: PromptDataset,
        tokenizer: Tokenizer,
        data: DataConfig,
        seed: int,
        *,
        verdicts: TraceVerdicts | None = None,
    ) -> None:
        if len(dataset) == 0:
            raise ValueError("data.prompts: the files hold no rows")
        if seed < 0:
            raise ValueError(f"run.seed={seed}: must not be negative")
        unknown = sorted(set(data.teachers or ()) - dataset.teachers)
        if unknown:
            known = ", ".join(sorted(dataset.teachers)) or "none"
            raise ValueError(f"data.teachers={unknown}: no row has a trace of theirs; the data's teachers are {known}")
        self._dataset, self._tokenizer, self._data, self._seed = dataset, tokenizer, data, seed
        self._verdicts = verdicts
        # Keep two epochs, since a call may cross their boundary.
        self._order = functools.lru_cache(maxsize=2)(functools.partial(epoch_order, seed, len(dataset)))

    def take(self, start: int, count: int, shard: int = 0, num_shards: int = 1) -> tuple[list[Prompt], DropCounts]:
        """Return the draws at positions [start, start + count) that are ≡ ``shard`` modulo ``num_shards``, tokenised.

        Prompts over the length limit are left out; ``DropCounts.too_long`` has their positions. ``Prompt.order`` is the
        position, ``Prompt.visit`` the epoch.
        """
        first = start + (shard - start) % num_shards
        return self.at(range(first, start + count, num_shards))

    def at(self, positions: Sequence[int]) -> tuple[list[Prompt], DropCounts]:
        """Return the draws at these positions, like :meth:`take`."""
        rows = [self._row_at(position) for position in positions]
        visits = [position // len(self._dataset) for position in positions]
        return self._prompts(rows, positions, visits, with_traces=True)

    def __len__(self) -> int:
        """Rows of the data: the draws of one epoch."""
        return len(self._dataset)

    def fingerprint(self) -> list[dict[str, Any]]:
        """Return :meth:`PromptDataset.fingerprint`."""
        return self._dataset.fingerprint()

    @property
    def teachers(self) -> list[str]:
        """Names of the teachers whose traces are used, in alphabetical order."""
        return sorted(self._dataset.teachers if self._data.teachers is None else set(self._data.teachers))

    def id_of(self, position: int) -> str:
        """``prompt_id`` of the draw at a position."""
        return self._dataset[self._row_at(position)].prompt_id

    def all(self, limit: int | None = None) -> tuple[list[Prompt], DropCounts]:
        """Return the first ``limit`` rows in the order of the files, without traces: a set to evaluate on."""
        count = len(self._dataset) if limit is None else min(limit, len(self._dataset))
        return self._prompts(range(count), range(count), [0] * count, with_traces=False)

    def _row_at(self, position: int) -> int:
        epoch, index = divmod(position, len(self._dataset))
        return int(self._order(epoch)[index]) if self._data.shuffle else index

    def _prompts(
        self, rows: Sequence[int], orders: Sequence[int], visits: Sequence[int], *, with_traces: bool
    ) -> tuple[list[Prompt], DropCounts]:
        # Read rows in file order, so that each Parquet row group is decoded once.
        found: dict[int, Prompt] = {}
        too_long, num_long_traces, num_wrong_traces = [], 0, 0
        for i in sorted(range(len(rows)), key=rows.__getitem__):
            tokens = None
            # Do not tokenise a prompt that is known to be too long.
            if (self._dataset.prompt_tokens(rows[i]) or 0) <= self._data.max_prompt_tokens:
                row = self._dataset[rows[i]]
                tokens = self._prompt_tokens(row)
            if tokens is None or len(tokens) > self._data.max_prompt_tokens:
                too_long.append(orders[i])
                continue
            traces, num_long, num_wrong = self._traces(rows[i], row, tokens) if with_traces else ({}, 0, 0)
            num_long_traces += num_long
            num_wrong_traces += num_wrong
            found[i] = make_prompt(row, tokens, self._tokenizer, visit=visits[i], order=orders[i], traces=traces)
        drops = DropCounts(too_long=tuple(sorted(too_long)), traces=num_long_traces, wrong_traces=num_wrong_traces)
        return [found[i] for i in sorted(found)], drops

    def _prompt_tokens(self, row: PromptRow) -> Tokens:
        try:
            return render_prompt(row.prompt, self._tokenizer, self._data)
        except ValueError as error:
            raise ValueError(f"prompt {row.prompt_id}: {error}") from error

    def _traces(self, number: int, row: PromptRow, prompt: Tokens) -> tuple[dict[str, Tokens], int, int]:
        """Return the traces to learn from, the number of traces that are too long, and the number of wrong ones."""
        wanted = row.traces if self._data.teachers is None else self._data.teachers
        index_of = self._dataset.trace_indices(number)
        kept: dict[str, Tokens] = {}
        num_long = num_wrong = 0
        for name in wanted:
            if name not in row.traces:
                continue
            if self._is_wrong(index_of[name]):
                num_wrong += 1
                continue
            if self._dataset.checked.trace_tokens[index_of[name]] <= self._data.max_trace_tokens:
                target = end_trace(row.traces[name], self._tokenizer, prompt)
                if len(target) <= self._data.max_trace_tokens:
                    kept[name] = target
                    continue
            num_long += 1
        return kept, num_long, num_wrong

    def _is_wrong(self, index: int) -> bool:
        if not self._data.drop_wrong_traces:
            return False
        if self._verdicts is None or self._verdicts.is_sample:
            raise AssertionError("data.drop_wrong_traces is on and nobody judged the traces, or only a sample of them")
        return self._verdicts.is_wrong(index)


def epoch_order(seed: int, num_rows: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return [num_rows] the permutation of one epoch, a pure function of (seed, epoch).

    It sorts raw Philox words, which are the same in every version of NumPy (unlike its ``permutation``). So a run that
    is resumed with another NumPy draws the same rows.
    """
    words = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(epoch,))).random_raw(num_rows)
    return np.argsort(words, kind="stable")
