"""FP8 e4m3 with one scale for each block of a weight: pure functions on slices with known positions.

The formula is DeepGEMM's ``per_block_cast_to_fp8`` with plain fp32 scales (not rounded to powers of two). SGLang 0.5.23
has a copy in ``benchmark/deepseek_utils.py``. For a block x (a row, if a row is the block)::

    amax = max(|x|, 1e-4)        scale = amax / 448        q = e4m3(x · (1 / amax · 448))        x ≈ q · scale

all in fp32 (torch computes ``448.0 / amax`` as reciprocal times 448). From each slice of a tensor comes an amax of the
blocks that it touches. The elementwise maximum over all slices is exact, so slices quantised with it equal, bit for
bit, slices of the whole tensor quantised at once.

Grids hold one fp32 number for each block [ceil(N / rows), ceil(K / cols)] of a weight [N, K]; ``block`` is (rows,
cols).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dypo.models.quantized.names import Quantization, block_shape

E4M3_MAX = 448.0
MIN_AMAX = 1e-4
"""Smallest amax, so that a block of zeros does not get the scale 0."""

_STRIPE_ELEMENTS = 1 << 20
"""Number of elements in fp32 at a time while a tensor is quantised."""


def touched_blocks(row: int, col: int, shape: tuple[int, ...], block: tuple[int, int]) -> tuple[slice, slice]:
    """Return the part of the grid whose blocks a slice of this ``shape`` at (``row``, ``col``) touches."""
    return _touched(row, shape[0], block[0]), _touched(col, shape[1], block[1])


def block_amax(part_nk: Tensor, row: int, col: int, block: tuple[int, int]) -> Tensor:
    """Return, in fp32 and not clamped, the largest magnitude of each block within a slice at (``row``, ``col``)."""
    down = _runs_amax(part_nk, row, block[0])
    return _runs_amax(down.T, col, block[1]).T.float().contiguous()


def scales_of(amax: Tensor) -> Tensor:
    """Return the scales of a grid of amax, as a checkpoint stores them: values are multiplied by them."""
    return amax.clamp(min=MIN_AMAX) / E4M3_MAX


def quantize_slice(part_nk: Tensor, row: int, col: int, amax: Tensor, block: tuple[int, int]) -> Tensor:
    """Quantise a slice at (``row``, ``col``) to e4m3 with the whole tensor's amax grid, a few rows at a time."""
    inverse = amax.clamp(min=MIN_AMAX).reciprocal() * E4M3_MAX
    num_rows, num_cols = part_nk.shape
    device = part_nk.device
    inverse = inverse[:, torch.arange(col, col + num_cols, device=device) // block[1]]
    grid_rows = torch.arange(row, row + num_rows, device=device) // block[0]
    output = torch.empty_like(part_nk, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format)
    step = max(1, _STRIPE_ELEMENTS // num_cols)
    for start in range(0, num_rows, step):
        stripe = slice(start, start + step)
        output[stripe] = (part_nk[stripe].float() * inverse[grid_rows[stripe]]).to(torch.float8_e4m3fn)
    return output


def quantize(weight_nk: Tensor, quantization: Quantization) -> tuple[Tensor, Tensor]:
    """Return a whole weight in e4m3, and its scales."""
    block = block_shape(quantization, tuple(weight_nk.shape))
    amax = block_amax(weight_nk, 0, 0, block)
    return quantize_slice(weight_nk, 0, 0, amax, block), scales_of(amax)


def _touched(start: int, length: int, block: int) -> slice:
    return slice(start // block, (start + length - 1) // block + 1)


def _runs_amax(values: Tensor, start: int, block: int) -> Tensor:
    """Return the largest magnitude over runs of rows; a run ends where ``start`` + row is a multiple of ``block``."""
    head = min(-start % block, len(values))
    tail = (len(values) - head) % block
    first, middle, last = values.split([head, len(values) - head - tail, tail])
    runs = (first.unsqueeze(0), middle.unflatten(0, (-1, block)), last.unsqueeze(0))
    return torch.cat([torch.linalg.vector_norm(run, torch.inf, dim=1) for run in runs if run.numel()])
