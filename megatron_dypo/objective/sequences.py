"""Means over whole sequences of a microbatch, given to each of their tokens. Pure.

Shape legend: N response tokens of one microbatch, S its sequences.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Across = Callable[[Tensor], Tensor]
"""Sums [S] float64 over the ranks that hold parts of the same sequences (context parallelism)."""


class Sequences:
    """The sequences of a microbatch's tokens, which may be split over ranks."""

    def __init__(self, index_N: Tensor, count: int, across: Across | None = None) -> None:
        """
        Args:
            index_N: [N] int64 sequence of each token, in [0, count).
            count: S; sequences without a token are allowed.
            across: None where each sequence is whole on this rank.
        """
        self._index_N, self._count, self._across = index_N, count, across
        length_S = self._sums(torch.ones_like(index_N, dtype=torch.float64))
        self.share_N = (1 / length_S)[index_N]
        """[N] float64 1/length of the token's sequence. Its sum over tokens counts sequences, also split ones."""

    def mean(self, value_N: Tensor) -> Tensor:
        """Return [N] of ``value_N``'s type, without gradient: the mean of ``value_N`` over the token's sequence."""
        return (self._sums(value_N.detach().double())[self._index_N] * self.share_N).to(value_N.dtype)

    def _sums(self, value_N: Tensor) -> Tensor:
        # float64, so that the order of additions on a GPU does not change the fp32 result.
        total_S = torch.zeros(self._count, dtype=torch.float64, device=value_N.device)
        total_S.index_add_(0, self._index_N, value_N)
        return total_S if self._across is None else self._across(total_S)
