"""Sequences → packed microbatches (``thd``). Pure and deterministic; legend in ``megatron_dypo.types``.

Each microbatch is as long as what it holds. Microbatches of equal work differ in tokens, so that a length common to all
would be that of the fullest one (3 to 5% padding on reasoning lengths, see ``benchmarks/packing.py``).
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
    """Return the number that the length of a microbatch must be a multiple of.

    Each rank holds ``T / context`` tokens in attention and matmuls, and ``T / (context · tensor)`` in between under
    sequence parallelism; a sequence is cut into ``2 · context`` pieces (zig-zag), of which a rank takes two.

    Args:
        token_multiple: tokens of one rank come in multiples of this: ``Config.token_multiple``.
    """
    return math.lcm(tensor * context * token_multiple, sequence_alignment(context))


def sequence_alignment(context: int) -> int:
    """Return the number that each sequence is padded to a multiple of: two parts for each context-parallel rank."""
    return 2 * context if context > 1 else 1


def plan_microbatches(
    lengths: Sequence[int], *, budget: int, count: int, costs: Sequence[float] | None = None
) -> list[list[int]]:
    """Return ``count`` bins of at most ``budget`` tokens, the costliest first; a longer sequence is alone.

    They are balanced by cost where that fits the budget, else filled one after the other, the last ones empty. Replicas
    run their i-th microbatches at the same time, and because of the order those cost about the same.

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
    """Return the (nearly) fewest microbatches that keep the budget and are balanced by cost; 0 without sequences.

    At most a quarter more than the fewest, or one if those are few, are spent on balance.
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
    """Return the tokens that each sample takes of a microbatch: its own, rounded up to ``alignment``."""
    return [-(-len(sample.tokens) // alignment) * alignment for sample in samples]


def microbatch_length(lengths: Sequence[int], bins: Sequence[Sequence[int]], alignment: int) -> int:
    """Return T for microbatches of one length: the fullest of ``bins``, rounded up; ``alignment`` if all are empty."""
    fullest = max((sum(lengths[i] for i in b) for b in bins), default=0)
    return max(-(-fullest // alignment), 1) * alignment


def pack(
    samples: Sequence[Sample],
    members: Sequence[int],
    length: int,
    alignment: int = 1,
    streams: Sequence[Stream] = STREAMS,
) -> Microbatch:
    """Pack ``samples[i] for i in members`` into one microbatch of ``length`` tokens; the rest is one padding sequence.

    A response token at position t of its sequence is the target of position t − 1, so its values stand there.

    Args:
        alignment: each sequence is padded at its end to a multiple of it, as context parallelism needs; it divides
            ``length``.
        streams: what the loss reads of each response token; () for a pass without a loss.

    Raises:
        ValueError: token weights for a stream that is not declared, or [R] values of another length than the response.
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
        """Write one sequence behind those that are there."""
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
        """Make the rest one padding sequence."""
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
    # Zeros are memory that the system clears when it is first touched.
    return np.full(length, stream.fill, stream.dtype) if stream.fill else np.zeros(length, stream.dtype)


def _require_length(stream: Stream, value: StreamValue, sample: Sample) -> None:
    if isinstance(value, np.ndarray) and value.shape != (sample.num_response_tokens,):
        raise ValueError(
            f"stream {stream.name} of shape {value.shape}: must be one number or [{sample.num_response_tokens}], the "
            "response's tokens"
        )
