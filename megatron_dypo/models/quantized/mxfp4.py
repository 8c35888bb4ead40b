"""MXFP4, in which gpt-oss is published: values of 4 bits in blocks of 32, each with a power of two (OCP Microscaling
Formats 1.0, sections 5.3.3 and 5.4.1)."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCKS, SCALES = "_blocks", "_scales"
"""Suffixes of the two stored tensors: [..., N, K/32, 16] uint8, two values a byte, and [..., N, K/32] uint8."""
BLOCK = 32
"""Values of a row that share a scale."""
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS = 127


def dequantize(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the bf16 values [N, K] of a matrix, exactly.

    Args:
        blocks: [N, K/32, 16] uint8; the lower four bits of a byte are the earlier value.
        scales: [N, K/32] uint8 exponents, 127 for one.
    """
    values = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], dtype=torch.float32)
    pairs = torch.stack([blocks & 0x0F, blocks >> 4], dim=-1).long()
    factors = torch.exp2(scales.float() - _BIAS)
    return (values[pairs].flatten(-2) * factors[..., None]).flatten(-2).bfloat16()
