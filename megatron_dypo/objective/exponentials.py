"""Sums and gradients over the exponentials of one chunk's logits, a few rows at a time. Pure.

Shape legend: R rows of a chunk, V vocabulary entries on this rank. s is a logit minus the top of its row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_dypo.objective.chunks import LOGITS_SHARE, SCRATCH_SHARE


@dataclass(frozen=True, kw_only=True)
class RowSums:
    """Where the sums of a chunk are written to: [R] each."""

    top_R: Tensor
    """Largest logit of this rank."""
    chosen_R: Tensor
    """Logit of the chosen column."""
    sum_R: Tensor
    """Σ exp(s)."""
    weighted_R: Tensor | None
    """Σ s·exp(s). None: it is not wanted."""


@dataclass(frozen=True, kw_only=True)
class RowGradients:
    """The terms of the gradient of the logits: [R] each.

    Without a gradient of the entropy the gradient of every row is 1·∂log π, for the caller to scale.
    """

    column_R: Tensor
    """int64 chosen column."""
    top_R: Tensor
    """Largest logit of all ranks."""
    lift_R: Tensor | None
    """Largest logit of this rank minus that of all. None: there is one rank."""
    onehot_R: Tensor
    """Subtracted from the chosen column: 0 for a token of another rank."""
    logp_grad_R: Tensor
    entropy_grad_R: Tensor | None
    mean_R: Tensor | None
    """Σ p·s over the whole vocabulary."""

    def of(self, rows: slice) -> RowGradients:
        optional = (self.lift_R, self.entropy_grad_R, self.mean_R)
        lift_R, entropy_grad_R, mean_R = (None if values is None else values[rows] for values in optional)
        return RowGradients(
            column_R=self.column_R[rows],
            top_R=self.top_R[rows],
            lift_R=lift_R,
            onehot_R=self.onehot_R[rows],
            logp_grad_R=self.logp_grad_R[rows],
            entropy_grad_R=entropy_grad_R,
            mean_R=mean_R,
        )


class Exponentials(Protocol):
    """The element-wise passes over a chunk of logits. The class says in which form ``sums`` leaves the chunk, for
    ``gradients`` to go on from."""

    def num_logits(self, memory_budget: int) -> int:
        """Return how many logits a chunk may have."""

    def sums(self, logits_RV: Tensor, column_R: Tensor, out: RowSums) -> None:
        """Write the sums of a chunk's rows to ``out``."""

    def gradients(self, chunk_RV: Tensor, terms: RowGradients, *, has_sums: bool) -> Tensor:
        """Return [R, V] the gradient of the logits times −Σ exp(s) of the whole vocabulary.

        That is exp(s) of each entry, minus ``onehot_R`` at the chosen one; with a gradient of the entropy,
        exp(s)·(g_logp + g_H·(s − Σ p·s)) instead: ∂ log π/∂logit_v contains −p_v, and ∂H/∂logit_v = −p_v·(log p_v + H),
        in which log Σ exp(s) cancels.

        Args:
            chunk_RV: logits, or what ``sums`` left of them (``has_sums``). It is overwritten.
        """


class TorchExponentials:
    """The passes in torch, for any floating type. ``sums`` leaves exp(s), with s below the top of this rank."""

    def __init__(self, dtype: torch.dtype, memory_budget: int) -> None:
        self._itemsize = dtype.itemsize
        self._scratch_bytes = int(memory_budget * SCRATCH_SHARE)

    def num_logits(self, memory_budget: int) -> int:
        return int(memory_budget * LOGITS_SHARE) // self._itemsize

    def sums(self, logits_RV: Tensor, column_R: Tensor, out: RowSums) -> None:
        out.chosen_R.copy_(logits_RV.gather(1, column_R[:, None])[:, 0])
        torch.amax(logits_RV, dim=1, out=out.top_R)
        logits_RV -= out.top_R[:, None]
        if out.weighted_R is None:
            torch.sum(logits_RV.exp_(), dim=1, out=out.sum_R)
            return
        for rows, scratch in self._few_rows(logits_RV):
            shifted = scratch.copy_(logits_RV[rows])
            torch.sum(logits_RV[rows].exp_(), dim=1, out=out.sum_R[rows])
            torch.sum(shifted.mul_(logits_RV[rows]), dim=1, out=out.weighted_R[rows])

    def gradients(self, chunk_RV: Tensor, terms: RowGradients, *, has_sums: bool) -> Tensor:
        if not has_sums:
            chunk_RV -= terms.top_R[:, None]
            chunk_RV.exp_()
        elif terms.lift_R is not None:
            chunk_RV *= terms.lift_R[:, None].exp()
        if terms.entropy_grad_R is not None:
            self._weigh(chunk_RV, terms)
        chunk_RV[torch.arange(len(chunk_RV), device=chunk_RV.device), terms.column_R] -= terms.onehot_R
        return chunk_RV

    def _weigh(self, exp_RV: Tensor, terms: RowGradients) -> None:
        """Multiply exp(s) by g_logp + g_H·(s − Σ p·s). exp(s) may have underflowed to 0."""
        assert terms.entropy_grad_R is not None
        assert terms.mean_R is not None
        tiny = torch.finfo(exp_RV.dtype).tiny  # its logarithm is finite, so that 0·log 0 is 0
        for rows, scratch in self._few_rows(exp_RV):
            shifted = torch.clamp(exp_RV[rows], min=tiny, out=scratch).log_().sub_(terms.mean_R[rows, None])
            exp_RV[rows] *= shifted.mul_(terms.entropy_grad_R[rows, None]).add_(terms.logp_grad_R[rows, None])

    def _few_rows(self, chunk_RV: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield the rows of a chunk a few at a time, with scratch of their shape: as many as fit into the scratch, and
        at least one."""
        step = max(1, self._scratch_bytes // (chunk_RV.shape[1] * chunk_RV.element_size()))
        scratch = torch.empty_like(chunk_RV[:step])
        for start in range(0, len(chunk_RV), step):
            rows = slice(start, min(start + step, len(chunk_RV)))
            yield rows, scratch[: rows.stop - rows.start]
