"""Rotary frequencies and the scale of attention scores, as the HF config defines them.

Megatron supports only one of llama3's four parameters. Its YaRN lacks ``attention_factor``, and its fused kernel for
packed microbatches applies no factor at all. So Megatron's plain rotary embedding gets the frequencies computed here,
and the factor is applied to the scale of the scores, which every attention takes: the local one, the one over
context-parallel ranks, and Transformer Engine's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.hf.rope_scaling import LinearRopeScaling, Llama3RopeScaling, YarnRopeScaling


def inverse_frequencies(arch: Architecture, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return [rotary_dim / 2], the angle per position of each rotated pair.

    In float32 the operations and their order are those of transformers (modeling_rope_utils.py), since at position
    100,000 even the last bit of a frequency matters.
    """
    exponent = torch.arange(0, arch.rotary_dim, 2, dtype=dtype) / arch.rotary_dim
    period = arch.rope_theta**exponent
    scaling = arch.rope_scaling
    if isinstance(scaling, LinearRopeScaling):
        return 1.0 / period / scaling.factor
    if isinstance(scaling, Llama3RopeScaling):
        return _llama3(1.0 / period, scaling)
    if isinstance(scaling, YarnRopeScaling):
        return _yarn(period, scaling, arch)
    return 1.0 / period


def softmax_scale(arch: Architecture) -> float | None:
    """Return the factor on attention scores. None: 1/√head_dim, the default of every attention.

    YaRN multiplies the cosines and sines of queries and keys by its attention factor. This multiplies the scores by its
    square. Multi-head latent attention has a factor of its own, in :func:`latent_scale`; where only some channels are
    rotated, :func:`rotated_scale` multiplies these.
    """
    if (
        arch.latent is not None
        or arch.rotary_dim < arch.head_dim
        or not isinstance(arch.rope_scaling, YarnRopeScaling)
        or arch.rope_scaling.attention_factor == 1
    ):
        return None
    return arch.rope_scaling.attention_factor**2 / math.sqrt(arch.head_dim)


def rotated_scale(arch: Architecture) -> float:
    """Return the factor on the cosines and sines of heads of which only some channels are rotated: YaRN's attention
    factor. 1 for other heads."""
    is_partial = arch.latent is None and arch.rotary_dim < arch.head_dim
    scaling = arch.rope_scaling
    return scaling.attention_factor if is_partial and isinstance(scaling, YarnRopeScaling) else 1.0


def latent_scale(arch: Architecture) -> dict[str, float]:
    """Return the fields from which Megatron computes the factor on the scores of multi-head latent attention:
    (0.1 · ``mscale_all_dim`` · ln ``rotary_scaling_factor`` + 1)² / √channels of a query
    (transformer/multi_latent_attention.py:113 of 0.16.1)."""
    scaling = arch.rope_scaling
    if not isinstance(scaling, YarnRopeScaling):
        return {"rotary_scaling_factor": 1.0, "mscale_all_dim": 0.0}
    return {"rotary_scaling_factor": scaling.factor, "mscale_all_dim": scaling.mscale_all_dim}


def _llama3(frequency: Tensor, scaling: Llama3RopeScaling) -> Tensor:
    """Divide frequencies of waves longer than ``original_max / low_freq_factor`` by ``factor``, keep those shorter than
    ``original_max / high_freq_factor``, and interpolate in between (Llama 3.1 release).
    """
    periods = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    keep = (periods - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return keep * frequency + (1 - keep) * frequency / scaling.factor


def _yarn(period: Tensor, scaling: YarnRopeScaling, arch: Architecture) -> Tensor:
    """Divide frequencies of pairs that turn less than ``beta_slow`` times over the original positions by ``factor``,
    keep those that turn more than ``beta_fast`` times, and interpolate linearly in the pair's index in between (arXiv
    2309.00071, section 3.2)."""

    def pair_of(num_turns: float) -> float:
        """Return the index (a fraction) of the pair that turns ``num_turns`` times over the original positions."""
        turns_of_first = scaling.original_max_position_embeddings / (num_turns * 2 * math.pi)
        return arch.rotary_dim * math.log(turns_of_first) / (2 * math.log(arch.rope_theta))

    first, last = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, arch.rotary_dim - 1)
    if first == last:
        last += 0.001  # transformers' way around a division by zero
    slow = ((torch.arange(len(period), dtype=period.dtype) - first) / (last - first)).clamp(0, 1)
    kept, slowed = 1.0 / period, 1.0 / (scaling.factor * period)
    keep = 1 - slow
    return slowed * (1 - keep) + kept * keep
