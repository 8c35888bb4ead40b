"""Sequences → packed rows (``thd``). Pure and deterministic; legend in ``megatron_dypo.types``.

Each row is as long as what it holds: rows of equal work differ in tokens, and a length common to all would be the fullest
row's (3 to 5% padding on reasoning lengths, see ``benchmarks/packing.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_dypo.batching.bins import bins_best_fit, bins_within
from megatron_dypo.types import Floats, Microbatch, Sample, TokenWeights, Treatment


def alignment(tensor: int, context: int, granule: int = 1) -> int:
    """What the length of a packed row must be a multiple of.

    Each rank holds ``T / context`` tokens in attention and matmuls, and ``T / (context · tensor)`` in between under
    sequence parallelism; a sequence is cut into ``2 · context`` pieces (zig-zag), of which a rank takes two.

    Args:
        granule: tokens of one rank come in multiples of this: ``Config.row_multiple``.
    """
    return math.lcm(tensor * context * granule, sequence_alignment(context))


def sequence_alignment(context: int) -> int:
    """What each sequence is padded to: it splits into two chunks for each context-parallel rank."""
    return 2 * context if context > 1 else 1


def plan_microbatches(
    lengths: Sequence[int], *, budget: int, count: int, costs: Sequence[float] | None = None
) -> list[list[int]]:
    """``count`` bins of at most ``budget`` tokens, the costliest first; a longer sequence is alone.

    Balanced by cost where that fits the budget, else as full as they get, the last ones empty. Replicas run their i-th
    microbatches at the same time: because of the order those are of like cost.

    Args:
        count: at least ``num_microbatches`` of the same arguments.
        costs: work of each sequence; None: its length.
    """
    work = [float(length) for length in lengths] if costs is None else costs
    bins = bins_within(work, lengths, count=count, capacity=budget)
    if bins is None:
        bins = bins_best_fit(lengths, budget)
        bins += [[] for _ in range(count - len(bins))]
    return sorted(bins, key=lambda members: -sum(work[i] for i in members))


def num_microbatches(lengths: Sequence[int], *, budget: int, costs: Sequence[float] | None = None) -> int:
    """The fewest microbatches, or nearly, that keep the budget and are balanced by cost; 0 without sequences.

    Up to a quarter more than the fewest (two, where those are few) are spent on balance.
    """
    work = [float(length) for length in lengths] if costs is None else costs
    count = fewest = len(bins_best_fit(lengths, budget))
    step = max(1, fewest // 128)
    while bins_within(work, lengths, count=count, capacity=budget) is None:
        count, step = count + step, 2 * step
        if count > fewest + max(2, fewest // 4):
            return fewest
    return count


def padded_lengths(samples: Sequence[Sample], alignment: int) -> list[int]:
    """What each sample takes of a row: its tokens, rounded up to ``alignment``."""
    return [-(-len(sample.tokens) // alignment) * alignment for sample in samples]


def row_length(lengths: Sequence[int], bins: Sequence[Sequence[int]], alignment: int) -> int:
    """T of rows of one length: the fullest of ``bins``, rounded up to ``alignment``, which an empty row has too."""
    fullest = max((sum(lengths[i] for i in b) for b in bins), default=0)
    return max(-(-fullest // alignment), 1) * alignment


def pack(samples: Sequence[Sample], members: Sequence[int], length: int, alignment: int = 1) -> Microbatch:
    """One row of ``length`` tokens from ``samples[i] for i in members``; what is left is one padding sequence.

    A response token at position t of its sequence is the target of position t − 1, so its weights stand there.

    Args:
        alignment: each sequence is padded at its end to a multiple of it, as context parallelism needs; it divides
            ``length``.
    """
    row = _Row(length, alignment)
    for index in members:
        row.append(samples[index], index)
    return row.finish()


class _Row:
    """A microbatch while it is filled from the left."""

    def __init__(self, length: int, alignment: int) -> None:
        self.length, self.used, self.boundaries = length, 0, [0]
        self.alignment = alignment
        self.integers: dict[str, Any] = {
            n: np.zeros(length, np.int32) for n in ("tokens_T", "positions_T", "targets_T")
        }
        self.sample_T = np.full(length, -1, np.int32)
        self.masks: dict[str, Any] = {n: np.zeros(length, np.bool_) for n in ("response_T", "is_trace_T")}
        names = (
            "advantage_T",
            "surrogate_T",
            "kl_T",
            "nll_T",
            "anchor_T",
            "old_logp_T",
            "ref_logp_T",
            "rollout_logp_T",
        )
        self.floats: dict[str, Any] = {n: np.zeros(length, np.float32) for n in names}

    def append(self, sample: Sample, index: int) -> None:
        start, size = self.used, len(sample.tokens)
        end = start + size
        self.used = end + -size % self.alignment
        assert self.used <= self.length, "row_length() covers every bin"
        self.integers["tokens_T"][start:end] = sample.tokens
        self.integers["positions_T"][start : self.used] = np.arange(self.used - start)
        self.integers["targets_T"][start : end - 1] = sample.tokens[1:]
        self.sample_T[start:end] = index
        response = slice(start + sample.num_prompt_tokens - 1, end - 1)
        self.masks["response_T"][response] = True
        self.masks["is_trace_T"][response] = sample.treatment is Treatment.DISTIL
        self._write_streams(response, sample, sample.weights or TokenWeights())
        self.boundaries.append(self.used)

    def _write_streams(self, response: slice, sample: Sample, weights: TokenWeights) -> None:
        streams: dict[str, float | Floats | None] = {
            "advantage_T": weights.advantage,
            "surrogate_T": weights.surrogate,
            "kl_T": weights.kl,
            "nll_T": weights.nll,
            "anchor_T": weights.anchor,
            "old_logp_T": sample.old_logp,
            "ref_logp_T": sample.ref_logp,
            "rollout_logp_T": sample.rollout_logp,
        }
        for name, value in streams.items():
            if value is not None:
                self.floats[name][response] = value

    def finish(self) -> Microbatch:
        if self.used < self.length:
            self.integers["positions_T"][self.used :] = np.arange(self.length - self.used)
            self.boundaries.append(self.length)
        sequences = np.arange(len(self.boundaries) - 1, dtype=np.int32)
        return Microbatch(
            cu_seqlens_S=np.array(self.boundaries, np.int32),
            sequence_T=np.repeat(sequences, np.diff(self.boundaries)),
            sample_T=self.sample_T,
            **self.integers,
            **self.masks,
            **self.floats,
        )
