"""Core attention over packed sequences with plain torch, and the description of a packed microbatch for Megatron.

Shapes: T tokens of the microbatch, h query heads and g key-value heads of this tensor-parallel rank, d channels of a
head, B sequences of a bucket padded to S tokens.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_dypo.mcore.sink_attention import Sinks, attend_with_sinks

SHORT = 32
"""Sequences up to this length always share a bucket, since a call costs more than the padding."""
FILL = 0.75
"""A longer sequence joins a bucket only if it fills at least this share of the padded length."""


@dataclass(frozen=True, eq=False)
class Bucket:
    """Sequences of similar length, processed in one call."""

    gather_N: torch.Tensor
    """[B·S] index of the token in each padded slot. Slots after a sequence's end repeat its last token."""
    num_sequences: int
    length: int


@dataclass(frozen=True, eq=False)
class Plan:
    """How a packed microbatch is divided into padded buckets and put together again."""

    buckets: tuple[Bucket, ...]
    slot_T: torch.Tensor
    """Position of token t in the concatenation of the padded buckets."""


def packed_seq_params(cu_seqlens_S: torch.Tensor) -> PackedSeqParams:
    """Return Megatron's description of a packed (``thd``) microbatch.

    Args:
        cu_seqlens_S: [S+1] int boundaries of its sequences, from 0 to T, on any device; converted to int32 for kernels.
    """
    cu_seqlens = cu_seqlens_S.to(torch.int32)
    longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


@functools.lru_cache(maxsize=64)
def plan(cu_seqlens: tuple[int, ...], device: torch.device) -> Plan:
    """Divide the sequences of a microbatch into buckets by length. Cached, since all layers use the same plan."""
    starts = cu_seqlens[:-1]
    lengths = [end - start for start, end in zip(starts, cu_seqlens[1:], strict=True)]
    slot_T = torch.empty(cu_seqlens[-1], dtype=torch.long)
    buckets, offset = [], 0
    for members in group_by_length(lengths):
        S = lengths[members[0]]
        start_B = torch.tensor([starts[i] for i in members])
        length_B = torch.tensor([lengths[i] for i in members])
        inside = torch.arange(S).expand(len(members), S)
        gather = start_B[:, None] + torch.minimum(inside, length_B[:, None] - 1)
        real = inside < length_B[:, None]
        slot_T[gather[real]] = offset + torch.arange(len(members) * S).view(len(members), S)[real]
        buckets.append(Bucket(gather.flatten().to(device), len(members), S))
        offset += len(members) * S
    return Plan(tuple(buckets), slot_T.to(device))


def group_by_length(lengths: list[int]) -> list[list[int]]:
    """Return the indices of the non-empty sequences in groups. Groups, and sequences in a group, are longest first."""
    groups: list[list[int]] = []
    for index in sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i]):
        longest = lengths[groups[-1][0]] if groups else None
        if longest is not None and (longest <= SHORT or lengths[index] >= FILL * longest):
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def fused_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """Return torch's ``scaled_dot_product_attention``, with zeros after the channels of shorter values.

    The kernels that keep no S × S scores take queries, keys and values of one size only.
    """
    missing = q.shape[-1] - v.shape[-1]
    if missing <= 0:
        return F.scaled_dot_product_attention(q, k, v, **options)
    return F.scaled_dot_product_attention(q, k, F.pad(v, (0, missing)), **options)[..., : v.shape[-1]]


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    where: Plan,
    scale: float | None = None,
    sinks: Sinks | None = None,
) -> torch.Tensor:
    """Compute causal attention within each sequence of a packed microbatch. It is exact, gradients included.

    Padding is after each sequence, so that under a causal mask no real token sees it. Outputs at padding are dropped.

    Args:
        q: [T, h, d]; k: [T, g, d]; v: [T, g, e], with g dividing h.
        where: the microbatch's plan.
        scale: factor on the scores; None: 1/√d.
        sinks: those of the h heads; None: none.

    Returns:
        [T, h·e]
    """
    outputs = []
    for bucket in where.buckets:
        shape = (bucket.num_sequences, bucket.length)
        q_BhSd, k_BgSd, v_BgSd = (
            x.index_select(0, bucket.gather_N).unflatten(0, shape).transpose(1, 2) for x in (q, k, v)
        )
        if sinks is not None:
            out_BhSe = attend_with_sinks(q_BhSd, k_BgSd, v_BgSd, sinks, scale)
        else:
            out_BhSe = fused_attention(
                q_BhSd, k_BgSd, v_BgSd, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        outputs.append(out_BhSe.transpose(1, 2).flatten(0, 1).flatten(1))
    padded = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return padded.index_select(0, where.slot_T)
