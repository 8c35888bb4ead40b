"""Matmuls with the output weight, accumulated in fp32 or fp64 for any type of the weight. Pure.

Shape legend: R rows of a chunk, V vocabulary entries on this rank, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class Projection:
    """An output weight as the operand of three matmuls: logits, gradient of the hidden states, its own gradient.

    On an accelerator a weight in bf16 or fp16 is multiplied as it is: matmuls there accumulate and return fp32. A
    gradient of the logits in fp32 is converted. On a CPU a matmul of bf16 returns bf16, so the weight is converted to
    fp32. Operands that must be converted are cut into blocks of the vocabulary; otherwise one matmul takes all of it.
    """

    def __init__(self, weight_VH: Tensor, dtype: torch.dtype, scratch_bytes: int) -> None:
        """
        Args:
            weight_VH: [V, H].
            dtype: of logits and gradients, fp32 or fp64.
            scratch_bytes: bound on the converted copies of a block; a block has at least one vocabulary entry.
        """
        self.dtype = dtype
        self._weight_VH, self._scratch_bytes = weight_VH, scratch_bytes
        is_narrow = weight_VH.dtype in (torch.bfloat16, torch.float16)
        self.operand = weight_VH.dtype if is_narrow and weight_VH.device.type != "cpu" else dtype
        """Type in which the matmuls take their operands."""

    def logits(self, hidden_RH: Tensor, scale: float, out_RV: Tensor) -> None:
        """out = scale · hidden @ weightᵀ."""
        hidden_RH = hidden_RH.to(self.operand)
        for columns, block_BH in self._blocks(num_gradients=0):
            _addmm(out_RV[:, columns], hidden_RH, block_BH.t(), beta=0, alpha=scale)

    def backward(self, grad_RV: Tensor, hidden_RH: Tensor, weight_grad_VH: Tensor | None) -> Tensor:
        """grad @ weight [R, H]; and weight_grad += gradᵀ @ hidden, where one is wanted."""
        hidden_RH = hidden_RH.to(self.operand)
        total_RH = torch.zeros(hidden_RH.shape, dtype=self.dtype, device=hidden_RH.device)
        num_converted = len(grad_RV) if grad_RV.dtype != self.operand else 0
        for columns, block_BH in self._blocks(num_gradients=num_converted):
            block_RB = grad_RV[:, columns].to(self.operand)
            _addmm(total_RH, block_RB, block_BH)
            if weight_grad_VH is not None:
                _addmm(weight_grad_VH[columns], block_RB.t(), hidden_RH)
        return total_RH

    def _blocks(self, *, num_gradients: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield columns of the logits and the operand for them. ``num_gradients`` values are converted for a column."""
        converted = num_gradients + (self._weight_VH.shape[1] if self._weight_VH.dtype != self.operand else 0)
        width = len(self._weight_VH)
        if converted:
            width = min(width, max(1, self._scratch_bytes // (converted * self.operand.itemsize)))
        for start in range(0, len(self._weight_VH), width):
            # Stop at the last row: the gradient may have more rows, for padding.
            columns = slice(start, min(start + width, len(self._weight_VH)))
            yield columns, self._weight_VH[columns].to(self.operand)


def _addmm(total: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> None:
    """total = beta·total + alpha·(a @ b) in place; the operands may be narrower than the total."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, alpha=alpha, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, alpha=alpha, out=total)
