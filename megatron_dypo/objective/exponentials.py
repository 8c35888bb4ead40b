"""Sums and gradients over the exponentials of one chunk's logits, in place and a few rows at a time. Pure.

Shape legend: R rows of a chunk, V vocabulary entries on this rank. A logit is given as s = logit − top of its row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def exp_and_sums(shifted_RV: Tensor, sum_R: Tensor, weighted_R: Tensor | None, scratch_bytes: int) -> None:
    """Replace s = ``shifted_RV`` by exp(s) in place; write Σ exp(s) to ``sum_R``, and Σ s·exp(s) to ``weighted_R`` if
    that is given."""
    if weighted_R is None:
        torch.sum(shifted_RV.exp_(), dim=1, out=sum_R)
        return
    for rows, scratch in _few_rows(shifted_RV, scratch_bytes):
        shifted = scratch.copy_(shifted_RV[rows])
        torch.sum(shifted_RV[rows].exp_(), dim=1, out=sum_R[rows])
        torch.sum(shifted.mul_(shifted_RV[rows]), dim=1, out=weighted_R[rows])


def weigh_by_gradients(
    exp_RV: Tensor, logp_grad_R: Tensor, entropy_grad_R: Tensor, mean_R: Tensor, scratch_bytes: int
) -> None:
    """Multiply exp(s) in place by g_logp + g_H·(s − Σ p·s).

    The result, times −1/Σ exp(s), is the gradient by the logits, except for the +g_logp of the chosen token:
    ∂ log π/∂logit_v contains −p_v, and ∂H/∂logit_v = −p_v·(log p_v + H), in which log Σ exp(s) cancels.

    Args:
        exp_RV: exp(s) with s ≤ 0; it may have underflowed to 0.
        mean_R: Σ p·s over the whole vocabulary.
    """
    tiny = torch.finfo(exp_RV.dtype).tiny  # its logarithm is finite, so that 0·log 0 is 0
    for rows, scratch in _few_rows(exp_RV, scratch_bytes):
        shifted = torch.clamp(exp_RV[rows], min=tiny, out=scratch).log_()
        shifted.sub_(mean_R[rows, None]).mul_(entropy_grad_R[rows, None]).add_(logp_grad_R[rows, None])
        exp_RV[rows] *= shifted


def _few_rows(chunk_RV: Tensor, scratch_bytes: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of a chunk a few at a time, with scratch of their shape: as many as fit into ``scratch_bytes``,
    and at least one."""
    step = max(1, scratch_bytes // (chunk_RV.shape[1] * chunk_RV.element_size()))
    scratch = torch.empty_like(chunk_RV[:step])
    for start in range(0, len(chunk_RV), step):
        rows = slice(start, min(start + step, len(chunk_RV)))
        yield rows, scratch[: rows.stop - rows.start]
