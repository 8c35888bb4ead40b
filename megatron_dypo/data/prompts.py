"""Prompts for a run: the seeded, endless, shardable stream of tokenised rows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_dypo.config.data import DataConfig
from megatron_dypo.data.dataset import PromptDataset
from megatron_dypo.data.rows import PromptRow
from megatron_dypo.data.tokenizers import Tokenizer
from megatron_dypo.types import Prompt, Tokens

__all__ = ["DropCounts", "PromptDataset", "PromptStream", "end_trace", "epoch_order"]


@dataclass(frozen=True, kw_only=True)
class DropCounts:
    """What the length limits dropped."""

    prompts: int = 0
    """Prompts longer than ``max_prompt_tokens``."""
    traces: int = 0
    """Traces longer than ``max_trace_tokens``; their prompts are kept."""

    def __add__(self, other: DropCounts) -> DropCounts:
        return DropCounts(prompts=self.prompts + other.prompts, traces=self.traces + other.traces)


class PromptStream:
    """The endless sequence of draws of a run: each epoch is a permutation of the rows.

    The row at a position is a pure function of (seed, position): the cursor is all there is to save, and shards of
    any number of ranks agree.
    """

    def __init__(self, dataset: PromptDataset, tokenizer: Tokenizer, data: DataConfig, seed: int) -> None:
        if len(dataset) == 0:
            raise ValueError("data.prompts: the files hold no rows")
        if seed < 0:
            raise ValueError(f"run.seed={seed}: must not be negative")
        unknown = sorted(set(data.teachers or ()) - dataset.teachers)
        if unknown:
            known = ", ".join(sorted(dataset.teachers)) or "none"
            raise ValueError(f"data.teachers={unknown}: no row has a trace of theirs; the data's teachers are {known}")
        self._dataset, self._tokenizer, self._data, self._seed = dataset, tokenizer, data, seed
        # Two epochs: a draw may straddle their boundary.
        self._order = functools.lru_cache(maxsize=2)(functools.partial(epoch_order, seed, len(dataset)))

    def take(self, start: int, count: int, shard: int = 0, num_shards: int = 1) -> tuple[list[Prompt], DropCounts]:
        """The draws at positions [start, start + count) that are ≡ ``shard`` modulo ``num_shards``, tokenised.

        Fewer where prompts were over the length limit; ``Prompt.order`` is the position, ``Prompt.visit`` the epoch.
        """
        first = start + (shard - start) % num_shards
        return self.at(range(first, start + count, num_shards))

    def at(self, positions: Sequence[int]) -> tuple[list[Prompt], DropCounts]:
        """The draws at these positions, as :meth:`take` gives them."""
        rows = [self._row_at(position) for position in positions]
        visits = [position // len(self._dataset) for position in positions]
        return self._prompts(rows, positions, visits, with_traces=True)

    def __len__(self) -> int:
        """Rows of the data: the draws of one epoch."""
        return len(self._dataset)

    def fingerprint(self) -> list[dict[str, Any]]:
        """As :meth:`PromptDataset.fingerprint`."""
        return self._dataset.fingerprint()

    def id_of(self, position: int) -> str:
        """``prompt_id`` of the draw at a position."""
        return self._dataset[self._row_at(position)].prompt_id

    def all(self, limit: int | None = None) -> tuple[list[Prompt], DropCounts]:
        """The first ``limit`` rows in the order of the files, without traces: a set to evaluate on."""
        count = len(self._dataset) if limit is None else min(limit, len(self._dataset))
        return self._prompts(range(count), range(count), [0] * count, with_traces=False)

    def _row_at(self, position: int) -> int:
        epoch, index = divmod(position, len(self._dataset))
        return int(self._order(epoch)[index]) if self._data.shuffle else index

    def _prompts(
        self, rows: Sequence[int], orders: Sequence[int], visits: Sequence[int], *, with_traces: bool
    ) -> tuple[list[Prompt], DropCounts]:
        # Rows are read in file order, so that each Parquet row group is decoded once.
        found: dict[int, Prompt] = {}
        drops = DropCounts()
        for i in sorted(range(len(rows)), key=rows.__getitem__):
            row = self._dataset[rows[i]]
            tokens = self._prompt_tokens(row)
            if len(tokens) > self._data.max_prompt_tokens:
                drops += DropCounts(prompts=1)
                continue
            traces = self._traces(row) if with_traces else {}
            kept = {name: trace for name, trace in traces.items() if len(trace) <= self._data.max_trace_tokens}
            drops += DropCounts(traces=len(traces) - len(kept))
            found[i] = Prompt(
                prompt_id=row.prompt_id,
                visit=visits[i],
                order=orders[i],
                tokens=tokens,
                text=self._tokenizer.decode(tokens.tolist()),
                answer=row.answer,
                source=row.source,
                traces=kept,
            )
        return [found[i] for i in sorted(found)], drops

    def _prompt_tokens(self, row: PromptRow) -> Tokens:
        try:
            return np.asarray(self._tokenizer.render(row.prompt, self._data.chat_template), dtype=np.int32)
        except ValueError as error:
            raise ValueError(f"prompt {row.prompt_id}: {error}") from error

    def _traces(self, row: PromptRow) -> dict[str, Tokens]:
        wanted = row.traces if self._data.teachers is None else self._data.teachers
        return {name: end_trace(row.traces[name], self._tokenizer) for name in wanted if name in row.traces}


def end_trace(text: str, tokenizer: Tokenizer) -> Tokens:
    """[R] A teacher's trace as a target: it ends with ``eos_id`` exactly once, however the text ended.

    A stop token that the text already ends with, and white space after it, is replaced.
    """
    ids = tokenizer.encode(text.rstrip())
    if not ids or ids[-1] not in tokenizer.eos_ids:
        ids = tokenizer.encode(text)
    while ids and ids[-1] in tokenizer.eos_ids:
        ids.pop()
    return np.asarray([*ids, tokenizer.eos_id], dtype=np.int32)


def epoch_order(seed: int, num_rows: int, epoch: int) -> npt.NDArray[np.int64]:
    """[num_rows] The permutation of one epoch: a pure function of (seed, epoch).

    Sorts raw Philox words, which NumPy keeps the same in every version (its ``permutation`` it does not), so that a
    run resumed with another NumPy draws the same.
    """
    words = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(epoch,))).random_raw(num_rows)
    return np.argsort(words, kind="stable")
