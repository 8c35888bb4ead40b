"""Sums and gradients over the exponentials of one chunk's fp32 logits, as one Triton kernel each: every logit is read
once.

Shape legend: R rows of a chunk, V vocabulary entries on this rank. s is a logit minus the top of its row.
"""

from __future__ import annotations

import functools
import logging

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_dypo.objective.exponentials import RowGradients, RowSums

_LARGEST_BLOCK = 4096
"""Entries that a program handles at once."""
_log = logging.getLogger(__name__)


class TritonExponentials:
    """The passes as kernels. ``sums`` leaves the logits as they are."""

    def __init__(self, operand: torch.dtype) -> None:
        """``operand``: type of the gradients of logits, which the matmuls of the backward pass take."""
        self._operand = operand
        self._gradients: Tensor | None = None

    def num_logits(self, memory_budget: int) -> int:
        # Gradients in fp32 overwrite the logits; narrower ones lie beside them.
        narrower = self._operand.itemsize if self._operand != torch.float32 else 0
        return memory_budget // (torch.float32.itemsize + narrower)

    def sums(self, logits_RV: Tensor, column_R: Tensor, out: RowSums) -> None:
        if not logits_RV.numel():
            return
        _sums_of_rows[len(logits_RV),](
            logits_RV,
            logits_RV.stride(0),
            column_R,
            out.top_R,
            out.chosen_R,
            out.sum_R,
            out.sum_R if out.weighted_R is None else out.weighted_R,  # not written if it is not wanted
            WIDTH=logits_RV.shape[1],
            IS_WEIGHTED=out.weighted_R is not None,
            **_block(logits_RV.shape[1]),
        )

    def gradients(self, chunk_RV: Tensor, terms: RowGradients, *, has_sums: bool) -> Tensor:
        out_RV = self._output(chunk_RV)
        if not chunk_RV.numel():
            return out_RV
        block = _block(chunk_RV.shape[1])
        has_entropy = terms.entropy_grad_R is not None
        unread = terms.logp_grad_R
        rows = (
            terms.column_R,
            terms.top_R,
            terms.onehot_R,
            terms.logp_grad_R,
            unread if terms.entropy_grad_R is None else terms.entropy_grad_R,
            unread if terms.mean_R is None else terms.mean_R,
        )
        _gradients_of_rows[len(chunk_RV), triton.cdiv(chunk_RV.shape[1], block["BLOCK"])](
            chunk_RV,
            chunk_RV.stride(0),
            out_RV,
            out_RV.stride(0),
            *(values.contiguous() for values in rows),  # autograd repeats one number by a stride of 0
            WIDTH=chunk_RV.shape[1],
            HAS_ENTROPY=has_entropy,
            **block,
        )
        return out_RV

    def _output(self, chunk_RV: Tensor) -> Tensor:
        """Return where the gradients are written to. The largest chunk comes first, and its memory is kept."""
        if self._operand == chunk_RV.dtype:
            return chunk_RV
        if self._gradients is None or len(self._gradients) < len(chunk_RV):
            self._gradients = torch.empty_like(chunk_RV, dtype=self._operand)
        return self._gradients[: len(chunk_RV)]


@functools.cache
def works_on(device: torch.device) -> bool:
    """Return whether Triton can compile and run a kernel on this device. It cannot without a C compiler, for example;
    a warning then says why."""
    one = torch.zeros(1, 1, device=device)
    sums = RowSums(top_R=one[0].clone(), chosen_R=one[0].clone(), sum_R=one[0].clone(), weighted_R=None)
    try:
        TritonExponentials(torch.float32).sums(one, torch.zeros(1, dtype=torch.int64, device=device), sums)
        reason = "" if sums.sum_R == 1 else f"exp(0) is {sums.sum_R.item()} in its kernel"
    except Exception as error:  # noqa: BLE001 (Triton, its compiler and the driver raise many types)
        reason = _in_one_line(error)
    if reason:
        _log.warning("log-probs are computed by torch, in more time: Triton cannot run here: %s", reason)
    return not reason


def _in_one_line(error: Exception) -> str:
    """Triton's own errors begin with the place in the source, and end with the reason."""
    return " ".join(f"{type(error).__name__}: {error}".split())[-400:]


def _block(width: int) -> dict[str, int]:
    block = min(_LARGEST_BLOCK, triton.next_power_of_2(width))
    return {"BLOCK": block, "num_warps": max(1, min(8, block // 128))}


@triton.jit
def _sums_of_rows(
    logits,
    row_stride,
    column,
    top,
    chosen,
    total,
    weighted,
    WIDTH: tl.constexpr,
    IS_WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each row. It keeps the largest logit so far, and sums below it."""
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * row_stride
    highest = tl.full((), -3.0e38, tl.float32)  # finite, so that its product with an empty sum is 0
    exps = tl.full((), 0.0, tl.float32)
    products = tl.full((), 0.0, tl.float32)
    for first in range(0, WIDTH, BLOCK):
        entries = first + tl.arange(0, BLOCK)
        logit = tl.load(start + entries, mask=entries < WIDTH, other=-float("inf"))
        higher = tl.maximum(highest, tl.max(logit, 0))
        shifted = logit - higher
        exp = tl.exp(shifted)
        lift = tl.exp(highest - higher)
        if IS_WEIGHTED:
            product = tl.where(exp > 0, shifted * exp, 0.0)  # not −inf·0
            products = lift * (products + (highest - higher) * exps) + tl.sum(product, 0)
        exps = lift * exps + tl.sum(exp, 0)
        highest = higher
    tl.store(top + row, highest)
    tl.store(chosen + row, tl.load(start + tl.load(column + row)))
    tl.store(total + row, exps)
    if IS_WEIGHTED:
        tl.store(weighted + row, products)


@triton.jit
def _gradients_of_rows(
    logits,
    row_stride,
    gradients,
    gradient_stride,
    column,
    top,
    onehot,
    logp_grad,
    entropy_grad,
    mean,
    WIDTH: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each block of a row."""
    row = tl.program_id(0)
    entries = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logit = tl.load(logits + row.to(tl.int64) * row_stride + entries, mask=entries < WIDTH, other=-float("inf"))
    shifted = logit - tl.load(top + row)
    gradient = tl.exp(shifted)
    if HAS_ENTROPY:
        factor = tl.load(logp_grad + row) + tl.load(entropy_grad + row) * (shifted - tl.load(mean + row))
        gradient = tl.where(gradient > 0, gradient * factor, gradient)  # not 0·(−inf)
    gradient -= tl.where(entries == tl.load(column + row), tl.load(onehot + row), 0.0)
    to = gradients + row.to(tl.int64) * gradient_stride + entries
    tl.store(to, gradient.to(gradients.dtype.element_ty), mask=entries < WIDTH)
