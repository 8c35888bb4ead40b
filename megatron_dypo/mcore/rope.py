"""Rotary frequencies, as the HF config defines them. Megatron knows only the factor of llama3's four parameters."""

from __future__ import annotations

import math

import torch

from megatron_dypo.architecture import Architecture


def inverse_frequencies(arch: Architecture) -> torch.Tensor:
    """[head_dim / 2] fp32 angle per position of each rotated pair.

    With ``rope_type: llama3`` waves longer than ``original_max / low_freq_factor`` are slowed by ``factor``, waves
    shorter than ``original_max / high_freq_factor`` are kept, those between are interpolated (Llama 3.1 release;
    transformers, modeling_rope_utils.py).
    """
    exponent = torch.arange(0, arch.head_dim, 2, dtype=torch.float32) / arch.head_dim
    frequency = 1.0 / (arch.rope_theta**exponent)
    scaling = arch.rope_scaling
    if scaling is None:
        return frequency
    periods = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    keep = (periods - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return keep * frequency + (1 - keep) * frequency / scaling.factor
