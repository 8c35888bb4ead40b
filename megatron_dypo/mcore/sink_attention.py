"""Attention whose softmax has a sink for each head, and sees a window of the last tokens on some layers.

A sink is a learned logit s: a query's weights are exp(x_j) / (exp(s) + Σ_k exp(x_k)) over the scores x of the keys that
it sees, so that they sum to less than one (gpt-oss; "off-by-one" is s = 0). It is computed as one more key with value
zero, before the first one. Queries and keys get more channels for it, from which its score follows, and torch's kernels
stay exact and keep no S × S scores; neither does a window, whose queries are cut into blocks of its size. Each block
sees its own keys and those of the block before.

Shapes: B sequences of S tokens; h query heads, g key-value heads that divide h, d channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sinks:
    """The sinks of a layer's heads on one rank, and the window of the layer."""

    logit_h: Tensor
    """Logit of each query head's sink."""
    window: int | None
    """Number of last tokens that a query sees, itself included; None: all."""


_GRANULE = 8
"""Number of channels of which fused kernels need a multiple."""


def attend_with_sinks(q_BhSd: Tensor, k_BgSd: Tensor, v_BgSd: Tensor, sinks: Sinks, scale: float | None) -> Tensor:
    """Return causal attention with sinks, [B, h, S, d]. The factor on the scores is ``scale``, or 1/√d for None."""
    if sinks.window is not None and sinks.window < q_BhSd.shape[2]:
        return _windowed(q_BhSd, k_BgSd, v_BgSd, sinks.logit_h, scale, sinks.window)
    # A query before the first one makes the matrix square, as the causal kernel needs it. It sees the sink alone.
    q_BhSd = F.pad(q_BhSd, (0, 0, 1, 0))
    return attend_to_all(q_BhSd, k_BgSd, v_BgSd, sinks.logit_h, scale)[:, :, 1:]


def attend_to_all(
    q_BhQd: Tensor,
    k_BgKd: Tensor,
    v_BgKd: Tensor,
    sink_h: Tensor,
    scale: float | None,
    sees_B1QK: Tensor | None = None,
) -> Tensor:
    """Return attention to the sink and to keys, [B, h, Q, d].

    Args:
        sees_B1QK: whether a query sees a key; None: query i sees keys 0 … i-1, for Q = K + 1.
    """
    channels = q_BhQd.shape[-1]
    scale = 1 / math.sqrt(channels) if scale is None else scale
    sees = None if sees_B1QK is None else F.pad(sees_B1QK, (1, 0), value=True)
    out = F.scaled_dot_product_attention(
        _queries(q_BhQd, sink_h, scale),
        _keys(k_BgKd),
        F.pad(v_BgKd, (0, _more(channels), 1, 0)),
        attn_mask=sees,
        is_causal=sees is None,
        scale=scale,
        enable_gqa=q_BhQd.shape[1] != k_BgKd.shape[1],
    )
    return out[..., :channels]


def _more(channels: int) -> int:
    """Return the additional channels: two for the sink, and zeros up to a multiple that kernels take."""
    return -(-(channels + 2) // _GRANULE) * _GRANULE - channels


def _queries(q_BhQd: Tensor, sink_h: Tensor, scale: float) -> Tensor:
    """Append the sink's score without its factor, as a rounded value and the rest, which bf16 would lose."""
    exact_h = sink_h.to(torch.promote_types(q_BhQd.dtype, torch.float32)) / scale
    rounded_h = exact_h.to(q_BhQd.dtype)
    rest_h = (exact_h - rounded_h).detach().to(q_BhQd.dtype)
    pair = torch.stack([rounded_h, rest_h], dim=-1)[None, :, None].expand(len(q_BhQd), -1, q_BhQd.shape[2], -1)
    return F.pad(torch.cat([q_BhQd, pair], dim=-1), (0, _more(q_BhQd.shape[-1]) - 2))


def _keys(k_BgKd: Tensor) -> Tensor:
    """Put the sink's key before the others: ones in the two channels in which they have zeros."""
    channels = k_BgKd.shape[-1]
    sink = torch.zeros(channels + _more(channels), dtype=k_BgKd.dtype, device=k_BgKd.device)
    sink[channels : channels + 2] = 1
    keys = F.pad(k_BgKd, (0, _more(channels)))
    return torch.cat([sink.expand(*keys.shape[:2], 1, -1), keys], dim=2)


def _windowed(q: Tensor, k: Tensor, v: Tensor, sink_h: Tensor, scale: float | None, window: int) -> Tensor:
    num_sequences, _, length, _ = q.shape
    blocks = -(-length // window)
    missing = blocks * window - length
    # Padding is after each sequence, so that no real query sees it.
    queries, keys, values = (_blocks(F.pad(x, (0, 0, 0, missing)), window) for x in (q, k, v))
    query = torch.arange(window, device=q.device)[:, None] + window
    key = torch.arange(2 * window, device=q.device)
    sees = (key <= query) & (key > query - window)
    is_there = (key >= window) | (torch.arange(blocks, device=q.device)[:, None, None] > 0)
    sees_B1QK = (sees & is_there).repeat(num_sequences, 1, 1)[:, None]
    out = attend_to_all(queries, _with_previous(keys, blocks), _with_previous(values, blocks), sink_h, scale, sees_B1QK)
    out_BhSd: Tensor = out.unflatten(0, (num_sequences, blocks)).transpose(1, 2).flatten(2, 3)
    return out_BhSd[:, :, :length]


def _blocks(x_BhSd: Tensor, window: int) -> Tensor:
    """Return [B·n, h, W, d], for n blocks of W tokens."""
    blocks: Tensor = x_BhSd.unflatten(2, (-1, window)).transpose(1, 2)
    return blocks.flatten(0, 1)


def _with_previous(x_NhWd: Tensor, blocks: int) -> Tensor:
    """Return [B·n, h, 2W, d]: before each block the one before it in its sequence, zeros before the first."""
    x_BnhWd: Tensor = x_NhWd.unflatten(0, (-1, blocks))
    previous = F.pad(x_BnhWd[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
    return torch.cat([previous, x_BnhWd], dim=3).flatten(0, 1)
