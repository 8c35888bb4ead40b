"""Shapes: stop-gradient factors of −log π that depend on the token's own probability. Pure.

A token's ``nll_weight`` is multiplied by the shape that its stream ``nll_shape`` names. The gradient of the loss is
then −w(p)·∇log π. Papers that write the loss as an integral of w have the same gradient, but another value.

Shape legend: N response tokens of one microbatch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ShapeInputs:
    """The inputs of a shape; each field is [N] and without gradient."""

    p: Tensor
    """π_θ of the token."""
    entropy: Tensor
    """H̄: the mean entropy of π_θ over the response tokens of the sequence."""
    constant: Tensor
    """The stream ``shape_constant``."""


SHAPES: dict[str, Callable[[ShapeInputs], Tensor]] = {
    "constant": lambda x: torch.ones_like(x.p),
    # γp/(p+γ)², the derivative of p/(p+γ) by log p (LUFFY, arXiv 2504.14945, eq. 6)
    "luffy": lambda x: x.constant * x.p / (x.p + x.constant) ** 2,
    # p(1−p) (CHORD, arXiv 2508.11408, eq. 5)
    "phi": lambda x: x.p * (1 - x.p),
    # p: importance sampling against a teacher of probability 1 (CHORD, eq. 4)
    "is": lambda x: x.p,
    # p/max(p, α) (TRAPO, arXiv 2512.17636)
    "trsft": lambda x: x.p / torch.maximum(x.p, x.constant),
    # e^(−H̄) + c·p: supervised learning and the policy gradient on a trace (SRFT, arXiv 2506.19767, eq. 8, 10)
    "srft": lambda x: torch.exp(-x.entropy) + x.constant * x.p,
    # e^(−H̄) + c·γp/(p+γ)² with γ = 0.1: SRFT in the re-implementation by HPT's authors
    "srft_luffy": lambda x: torch.exp(-x.entropy) + x.constant * 0.1 * x.p / (x.p + 0.1) ** 2,
    # e^(H̄) (SRFT, eq. 12)
    "exp_entropy": lambda x: torch.exp(x.entropy),
}
"""Name → factor [N]. A new shape is a row here."""

_NAMES = tuple(SHAPES)


def shape_index(name: str) -> float:
    """Return the value of the stream ``nll_shape`` for the shape of this name; 0 is ``constant``."""
    return float(_NAMES.index(name))


def shape_factor(index_N: Tensor, x: ShapeInputs) -> Tensor:
    """Return [N] the factor of each token, by the shape that ``index_N`` gives it."""
    factor_N = torch.ones_like(x.p)
    for index, shape in enumerate(SHAPES.values()):
        if index > 0:
            factor_N = torch.where(index_N == index, shape(x), factor_N)
    return factor_N
