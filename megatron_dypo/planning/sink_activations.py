"""Count the bytes that attention with sinks (``mcore/sink_attention.py``) keeps until its backward pass. Pure."""

from __future__ import annotations

from megatron_dypo.models.architecture import Architecture

_FP32 = 4
_GRANULE = 8
"""Channels of a head are padded to a multiple of this, with two more for the sink."""


def sink_bytes(arch: Architecture, element: int, *, grouped: bool) -> float:
    """Return the bytes for each token, as a mean over the layers.

    A query and an output of each head are kept, and a key and a value of each key-value head; in a window two of each,
    since a block of queries keeps the keys of the block before, and a mask of two blocks.

    Args:
        grouped: torch's kernels take grouped heads together with a mask, as they do on a CPU. Otherwise its plain
            mathematics is assumed, which gives each query head a key and a value, and keeps scores and weights.
    """
    h, g = arch.num_attention_heads, arch.num_key_value_heads
    channels = -(-(arch.head_dim + 2) // _GRANULE) * _GRANULE
    whole = element * (2 * h + 2 * g) * channels + _FP32 * h
    if arch.windows is None:
        return float(whole)
    keys = 2 * arch.windows.size + 1
    windowed = element * ((2 * h + 4 * g) * channels + keys) + keys + _FP32 * h
    if not grouped:
        windowed = element * (6 * h * channels + h * keys) + _FP32 * h * keys
    share = len(arch.windows.layers) / arch.num_layers
    return share * windowed + (1 - share) * whole
