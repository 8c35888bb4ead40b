"""Sequences → packed microbatches (``thd``). Pure and deterministic; legend in ``megatron_dypo.types``.

Each microbatch has its own length. Microbatches of equal work differ in tokens, so a common length would have to be
that of the longest (3 to 5% padding for lengths of reasoning data, see ``benchmarks/packing.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_dypo.batching.bins import bins_best_fit, bins_within
from megatron_dypo.objective.streams import STREAMS, Stream
from megatron_dypo.types import Microbatch, Sample, StreamValue


def alignment(tensor: int, context: int, token_multiple: int = 1) -> int:
    """Return the number of which the length of a microbatch must be a multiple.

    Each rank holds ``T / context`` tokens in attention and matmuls, and with sequence parallelism ``T / (context ·
    tensor)`` in between. A sequence is divided into ``2 · context`` parts (zig-zag), of which a rank takes two.

    Args:
        token_multiple: the tokens of one rank must be a multiple of this (``Config.token_multiple``).
    """
    return math.lcm(tensor * context * token_multiple, sequence_alignment(context))


def sequence_alignment(context: int) -> int:
    """Return the number to a multiple of which each sequence is padded: two parts for each context-parallel rank."""
    return 2 * context if context > 1 else 1


def plan_microbatches(
    lengths: Sequence[int], *, budget: int, count: int, costs: Sequence[float] | None = None
) -> list[list[int]]:
    """Return ``count`` bins of at most ``budget`` tokens, the costliest first. A longer sequence gets its own bin.

    Bins are balanced by cost if that fits the budget, else filled one after the other, so that the last may be empty.
    Replicas run their i-th microbatches at the same time; because of the order these cost about the same.

    Args:
        count: at least ``num_microbatches`` with the same arguments.
        costs: work of each sequence; None: its length.
    """
    work = [float(length) for length in lengths] if costs is None else costs
    bins = bins_within(work, lengths, count=count, capacity=budget)
    if bins is None:
        bins = bins_best_fit(lengths, budget)
        bins += [[] for _ in range(count - len(bins))]
    return sorted(bins, key=lambda members: -sum(work[i] for i in members))


def num_microbatches(lengths: Sequence[int], *, budget: int, costs: Sequence[float] | None = None) -> int:
    """Return the (nearly) fewest microbatches that fit the budget and are balanced by cost; 0 without sequences.

    For balance there may be a quarter more than the fewest, or one more if there are few.
    """
    work = [float(length) for length in lengths] if costs is None else costs
    count = fewest = len(bins_best_fit(lengths, budget))
    step = max(1, fewest // 128)
    while bins_within(work, lengths, count=count, capacity=budget) is None:
        count, step = count + step, 2 * step
        if count > fewest + max(1, fewest // 4):
            return fewest
    return count


def padded_lengths(samples: Sequence[Sample], alignment: int) -> list[int]:
    """Return the tokens that each sample takes in a microbatch: its length, rounded up to ``alignment``."""
    return [-(-len(sample.tokens) // alignment) * alignment for sample in samples]


def microbatch_length(lengths: Sequence[int], bins: Sequence[Sequence[int]], alignment: int) -> int:
    """Return the length of the fullest of ``bins``, rounded up to ``alignment``; ``alignment`` if all are empty."""
    fullest = max((sum(lengths[i] for i in b) for b in bins), default=0)
    return max(-(-fullest // alignment), 1) * alignment


def padding_ratio(microbatches: Sequence[Microbatch]) -> float:
    """Return the share of positions that are padding."""
    padding = sum(int((microbatch.sample_T < 0).sum()) for microbatch in microbatches)
    return padding / sum(len(microbatch.sample_T) for microbatch in microbatches)


def pack(
    samples: Sequence[Sample],
    members: Sequence[int],
    length: int,
    alignment: int = 1,
    streams: Sequence[Stream] = STREAMS,
) -> Microbatch:
    """Pack ``samples[i] for i in members`` into one microbatch of ``length`` tokens; the rest is one padding sequence.

    A response token at position t of its sequence is the target of position t − 1, so its values are stored there.

    Args:
        alignment: each sequence is padded to a multiple of this, as context parallelism requires. It must divide
            ``length``.
        streams: values of each response token for the loss; () for a pass without a loss.

    Raises:
        ValueError: token weights belong to no declared stream, or [R] values differ in length from the response.
    """
    packed = _Packed(length, alignment, streams)
    for index in members:
        packed.append(samples[index], index)
    return packed.finish()


class _Packed:
    """A microbatch while it is filled from the left."""

    def __init__(self, length: int, alignment: int, streams: Sequence[Stream]) -> None:
        self._length, self._alignment, self._used, self._boundaries = length, alignment, 0, [0]
        self._declared, self._names = streams, {stream.name for stream in streams}
        self._tokens_T, self._positions_T, self._targets_T = (np.zeros(length, np.int32) for _ in range(3))
        self._response_T = np.zeros(length, np.bool_)
        self._sample_T = np.full(length, -1, np.int32)
        self._streams = {stream.name: _filled(length, stream) for stream in streams}

    def append(self, sample: Sample, index: int) -> None:
        """Append one sequence."""
        start, size = self._used, len(sample.tokens)
        end = start + size
        self._used = end + -size % self._alignment
        assert self._used <= self._length, "microbatch_length() covers every bin"
        self._tokens_T[start:end] = sample.tokens
        self._positions_T[start : self._used] = np.arange(self._used - start)
        self._targets_T[start : end - 1] = sample.tokens[1:]
        self._sample_T[start:end] = index
        response = slice(start + sample.num_prompt_tokens - 1, end - 1)
        self._response_T[response] = True
        self._write_streams(response, sample)
        self._boundaries.append(self._used)

    def _write_streams(self, response: slice, sample: Sample) -> None:
        if self._names and sample.weights and (unknown := sample.weights.keys() - self._names):
            raise ValueError(f"token weights {sorted(unknown)}: no stream of the objective has such a name")
        for stream in self._declared:
            value = stream.value_of(sample)
            if value is not None:
                _require_length(stream, value, sample)
                self._streams[stream.name][response] = value

    def finish(self) -> Microbatch:
        """Fill the rest with one padding sequence."""
        if self._used < self._length:
            self._positions_T[self._used :] = np.arange(self._length - self._used)
            self._boundaries.append(self._length)
        sequences = np.arange(len(self._boundaries) - 1, dtype=np.int32)
        return Microbatch(
            tokens_T=self._tokens_T,
            positions_T=self._positions_T,
            cu_seqlens_S=np.array(self._boundaries, np.int32),
            targets_T=self._targets_T,
            response_T=self._response_T,
            sequence_T=np.repeat(sequences, np.diff(self._boundaries)),
            sample_T=self._sample_T,
            streams=self._streams,
        )


def _filled(length: int, stream: Stream) -> npt.NDArray[Any]:
    # The system provides zeros lazily, when memory is first used.
    return np.full(length, stream.fill, stream.dtype) if stream.fill else np.zeros(length, stream.dtype)


def _require_length(stream: Stream, value: StreamValue, sample: Sample) -> None:
    if isinstance(value, np.ndarray) and value.shape != (sample.num_response_tokens,):
        raise ValueError(
            f"stream {stream.name} of shape {value.shape}: must be one number or [{sample.num_response_tokens}], the "
            "response's tokens"
        )
