"""Attention without packing, to compare with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

CPU = torch.device("cpu")


def literal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Sequence[int],
    *,
    scale: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Compute attention, [T, h, d] → [T, h·d], one query, one head and one sequence at a time.

    Args:
        scale: factor on the scores; None: 1/√d.
        sinks: [h] logits in each query's softmax that have no value.
        window: number of last tokens that a query sees, itself included.
    """
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    rows = []
    for start, end in itertools.pairwise(cu_seqlens):
        for t in range(start, end):
            heads = []
            for head in range(q.shape[1]):
                group = head * k.shape[1] // q.shape[1]
                first = start if window is None else max(start, t + 1 - window)
                scores = k[first : t + 1, group] @ q[t, head] * scale
                if sinks is not None:
                    scores = torch.cat([sinks[head : head + 1], scores])
                weights = scores.softmax(0)[-(t + 1 - first) :]
                heads.append(weights @ v[first : t + 1, group])
            rows.append(torch.cat(heads))
    return torch.stack(rows)


def boundaries(lengths: Iterable[int]) -> tuple[int, ...]:
    return tuple(itertools.accumulate(lengths, initial=0))
