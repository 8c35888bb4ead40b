"""Operands of fused log-probs, and float64 references for them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.present import present

HIDDEN = 24
ONE_ROW = 1
"""A memory budget that holds less than one row."""
THREE_ROWS = int(3 * 16 * 4 / 0.75)
EVERYTHING = 2**20


def logits_as_hidden(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Return hidden states and a weight whose product is exactly these logits."""
    return logits_NV.clone(), torch.eye(logits_NV.shape[1])


def projected(g: torch.Generator, num_rows: int = 7, size: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return operands on a grid of 1/8 and 1/32, so coarse that fp32 holds every partial sum of a logit exactly.

    Otherwise the order of additions in a processor's matmul would move logits by about 1e-5, and entropies by 1e-6 (at
    a size of 20). That is the rounding of the matmul, not of the code under test.
    """
    hidden_NH = torch.randn(num_rows, HIDDEN, generator=g).mul(8).round() / 8
    weight_VH = torch.randn(16, HIDDEN, generator=g).mul(32).round() / 32
    return size * hidden_NH, weight_VH


CASES: dict[str, Callable[[torch.Generator], tuple[Tensor, Tensor]]] = {
    "random": projected,
    "peaked": lambda g: projected(g, size=20.0),
    "one row": lambda g: projected(g, num_rows=1),
    "huge": lambda g: logits_as_hidden((torch.rand(7, 16, generator=g) - 0.5) * 2e4),
    "extremes": lambda g: logits_as_hidden(2e4 * torch.randint(0, 2, (7, 16), generator=g) - 1e4),
    "one-hot": lambda g: logits_as_hidden(torch.eye(16)[:7] * 1e4),
    "near one-hot": lambda g: logits_as_hidden(torch.eye(16)[:7] * 8 - 1e4),
    "ties": lambda g: logits_as_hidden(torch.full((7, 16), 1e4)),
}


def weighted_sum(logp_N: Tensor, coef_N: Tensor, entropy_N: Tensor | None, entropy_coef_N: Tensor | None) -> Tensor:
    """Return the loss of these tests; an entropy without coefficients is left out of the graph."""
    loss = (logp_N * coef_N).sum()
    return loss if entropy_coef_N is None else loss + (present(entropy_N) * entropy_coef_N).sum()


def reference(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    coef_N: Tensor,
    vocab_size: int,
    temperature: float = 1.0,
    entropy_coef_N: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return in float64 log-probs, entropy, gradients of Σ coef·logp (+ coef·entropy) by hidden and weight."""
    hidden, weight = (t.detach().double().requires_grad_() for t in (hidden_NH, weight_VH))
    logits = hidden @ weight.t() / temperature
    is_padding = torch.arange(len(weight)) >= vocab_size
    logp_NV = logits.masked_fill(is_padding, float("-inf")).log_softmax(dim=-1)
    entropy_N = -(logp_NV.exp() * logp_NV.masked_fill(is_padding, 0.0)).sum(-1)
    logp_N = logp_NV.gather(1, targets_N[:, None])[:, 0]
    weighted_sum(logp_N, coef_N.double(), entropy_N, entropy_coef_N).backward()
    return logp_N.detach(), entropy_N.detach(), present(hidden.grad), present(weight.grad)


def relative_error(ours: Tensor, expected: Tensor) -> float:
    """Return the error relative to the largest entry; the absolute error if all entries are below one."""
    if not expected.numel():
        return 0.0
    return float((ours.double() - expected).abs().max() / max(float(expected.abs().max()), 1.0))


def gradient_error(ours: Tensor, expected: Tensor) -> float:
    """Return the error relative to the largest entry, even a small one. Zeros of float64 must be zeros of the code."""
    largest = float(expected.abs().max())
    error = float((ours.double() - expected).abs().max())
    return error / largest if largest > 1e-300 else error


def over_ranks(size: int, work: Callable[[int, dist.ProcessGroup], Any]) -> list[Any]:
    """Return the results of ``work(rank, group)`` on each of ``size`` ranks, which are threads."""
    store, deadline = dist.HashStore(), timedelta(seconds=60)

    def rank_work(rank: int) -> Any:
        group: Any = dist.ProcessGroupGloo(store, rank, size, deadline)
        return work(rank, group)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank_work, range(size)))
