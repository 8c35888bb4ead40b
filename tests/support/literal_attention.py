"""Attention without packing, to compare with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

CPU = torch.device("cpu")


def literal_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Sequence[int]) -> Tensor:
    """Compute attention, [T, h, d] → [T, h·d], one query, one head and one sequence at a time."""
    rows = []
    for start, end in itertools.pairwise(cu_seqlens):
        for t in range(start, end):
            heads = []
            for head in range(q.shape[1]):
                group = head * k.shape[1] // q.shape[1]
                scores = k[start : t + 1, group] @ q[t, head] / math.sqrt(q.shape[2])
                heads.append(scores.softmax(0) @ v[start : t + 1, group])
            rows.append(torch.cat(heads))
    return torch.stack(rows)


def boundaries(lengths: Iterable[int]) -> tuple[int, ...]:
    return tuple(itertools.accumulate(lengths, initial=0))
