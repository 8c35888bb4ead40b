"""Sequences → packed rows (``thd``). Pure and deterministic; legend in ``megatron_dypo.types``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_dypo.types import Floats, Microbatch, Sample, TokenWeights, Treatment


def bins_first_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """First-fit decreasing: indices into ``lengths``, each bin at most ``budget`` (a longer one is alone)."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        slot = next((b for b, free in enumerate(room) if free >= lengths[index]), None)
        if slot is None:
            bins.append([])
            room.append(budget)
            slot = len(bins) - 1
        bins[slot].append(index)
        room[slot] -= lengths[index]
    return bins


def bins_balanced(costs: Sequence[float], count: int) -> list[list[int]]:
    """Exactly ``count`` bins of about equal cost: largest first into the lightest bin."""
    bins: list[list[int]] = [[] for _ in range(count)]
    load = [0.0] * count
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        slot = min(range(count), key=lambda b: (load[b], b))
        bins[slot].append(index)
        load[slot] += costs[index]
    return bins


def plan_microbatches(lengths: Sequence[int], *, budget: int, count: int) -> list[list[int]]:
    """``count`` bins within ``budget``, balanced where that fits, else first-fit with empty bins at the end."""
    balanced = bins_balanced([float(length) for length in lengths], count)
    if all(sum(lengths[i] for i in b) <= budget or len(b) == 1 for b in balanced):
        return balanced
    bins = bins_first_fit(lengths, budget)
    return bins + [[] for _ in range(count - len(bins))]


def padded_lengths(samples: Sequence[Sample], alignment: int) -> list[int]:
    """What each sample takes of a row: its tokens, rounded up to ``alignment``."""
    return [-(-len(sample.tokens) // alignment) * alignment for sample in samples]


def row_length(lengths: Sequence[int], bins: Sequence[Sequence[int]], alignment: int) -> int:
    """T: the fullest row, rounded up to ``alignment`` (tensor-parallel size under sequence parallelism)."""
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
        names = ("advantage_T", "surrogate_T", "kl_T", "nll_T", "old_logp_T", "ref_logp_T", "rollout_logp_T")
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
        return Microbatch(
            cu_seqlens_S=np.array(self.boundaries, np.int32),
            sample_T=self.sample_T,
            **self.integers,
            **self.masks,
            **self.floats,
        )
