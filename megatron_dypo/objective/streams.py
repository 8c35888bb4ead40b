"""Per-token streams: numbers that packing writes beside the tokens and the loss reads. They are declared only here.

Packing, the move to the device and the inputs of the loss all follow from an objective's tuple of :class:`Stream`.
Samples that are sent between ranks carry everything in ``Sample.weights``. To add a stream, an objective declares
``(*STREAMS, Stream(name="shape"))``.

Shape legend: R response tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import numpy.typing as npt

from megatron_dypo.types import Sample, SampleKind, StreamValue


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One value for each response token."""

    name: str
    """The key of ``Sample.weights``, ``Microbatch.streams`` and ``LossInputs``."""
    meaning: str = ""
    dtype: npt.DTypeLike = np.float32
    fill: float = 0.0
    """The value of tokens without one. Prompts and padding have it too, but the loss never reads those."""
    read: Callable[[Sample], StreamValue | None] | None = None
    """Reads the value from a sample. None: the value is ``Sample.weights[name]``, which an objective sets."""

    def value_of(self, sample: Sample) -> StreamValue | None:
        """Return one number for all response tokens of ``sample``, or [R]; None where there is none."""
        if self.read is not None:
            return self.read(sample)
        return None if sample.weights is None else sample.weights.get(self.name)


def _is_trace(sample: Sample) -> StreamValue:
    if sample.num_forced_tokens:
        return np.arange(sample.num_response_tokens) < sample.num_forced_tokens
    return sample.kind is SampleKind.TRACE


STREAMS = (
    Stream(name="advantage", meaning="Â of GRPO (eq. 21)"),
    Stream(name="pg_weight", meaning="weight of the clipped policy-gradient surrogate (eq. 22)"),
    Stream(name="kl_weight", meaning="weight of the k3 estimate of KL(π_θ‖π_ref)"),
    Stream(name="nll_weight", meaning="weight of −log π: positive for a teacher's trace, −(1−α)·c_i/n for GAL"),
    Stream(
        name="gal_scale",
        meaning="GAL only: 1 / (length divisor of ℓ). It marks GAL's tokens and scales the logged drift of ℓ",
    ),
    Stream(
        name="nll_shape",
        meaning="index of the shape that multiplies the nll weight (megatron_dypo.objective.shapes); 0: constant",
    ),
    Stream(name="shape_constant", meaning="the constant of that shape"),
    Stream(name="entropy_weight", meaning="weight of the entropy of π_θ, which the loss subtracts"),
    Stream(name="old_logp", meaning="log π_old", read=attrgetter("old_logp")),
    Stream(name="ref_logp", meaning="log π_ref", read=attrgetter("ref_logp")),
    Stream(name="rollout_logp", meaning="the server's log-prob", read=attrgetter("rollout_logp")),
    Stream(
        name="is_trace",
        meaning="True: a teacher's token; False: a sampled one",
        dtype=np.bool_,
        read=_is_trace,
    ),
)
"""The streams that :func:`megatron_dypo.objective.loss.token_loss` reads. The weights already include the length
divisor, 1/n and the share of the tier, so that the loss is a plain sum."""
