"""Log-prob and entropy of chosen tokens from hidden states, fused with the vocab-parallel output projection.

Logits exist for one chunk of rows at a time. The backward pass computes them again. The caller passes the
tensor-parallel group.

Shape legend: N rows (response tokens of a microbatch), R rows of one chunk, V vocabulary entries on this rank, H hidden
size; ranks hold the vocabulary in their order.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_dypo.objective.chunks import BLOCKS_SHARE, rows_of_chunks
from megatron_dypo.objective.exponentials import Exponentials, RowGradients, RowSums, TorchExponentials
from megatron_dypo.objective.projection import Projection

_AUTOMATIC_FLOOR = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class GradientSink:
    """A tensor that accumulates the weight's gradient, so that autograd need not allocate one."""

    total_VH: Tensor
    """fp32 (fp64 for an fp64 weight). The backward pass adds the gradient to it."""
    done: Callable[[], Tensor | None]
    """Called after the gradient is added. Autograd takes its result as the weight's gradient."""


def fused_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    with_entropy: bool = True,
    memory_budget: int | None = None,
    sink: GradientSink | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return log π(target) and the entropy of π = softmax(hidden · weightᵀ / temperature), in fp32 (fp64 for fp64).

    The gradient of ``hidden_NH`` is this rank's share: the caller sums it over the group. The function can be
    differentiated once.

    Args:
        hidden_NH: [N, H] any float type, the same on every rank of the group.
        weight_VH: [V, H] this rank's rows of the vocabulary.
        targets_N: [N] int64 token ids of the whole vocabulary.
        vocab_size: size of the vocabulary. Rows from there on are padding and get no probability and no gradient.
        group: tensor-parallel group; None for a whole vocabulary on one rank.
        with_entropy: whether to compute the entropy.
        memory_budget: bytes of scratch besides the gradients. It sets the rows of a chunk (at least one). None: the
            size of the weight in fp32, and at least 256 MiB.
        sink: takes the weight's gradient. None: autograd takes it.

    Returns:
        ``logp_N`` (−inf for a target outside the vocabulary) and ``entropy_N`` (None if not wanted), both with
        gradient, and the same on every rank of the group. The entropy's gradient costs nothing unless the caller uses
        it.

    Raises:
        ValueError: some rank of the group holds padding only.
    """
    dtype = torch.promote_types(torch.promote_types(hidden_NH.dtype, weight_VH.dtype), torch.float32)
    rank, size = (group.rank(), group.size()) if group is not None else (0, 1)
    width = len(weight_VH)
    if width * (size - 1) >= vocab_size:
        raise ValueError(f"vocab_size={vocab_size}: {size} tensor-parallel ranks of {width} entries; the last has none")
    call = _Call(
        first=width * rank,
        width=min(width, vocab_size - width * rank),
        group=group if size > 1 else None,
        scale=1.0 / temperature,
        dtype=dtype,
        with_entropy=with_entropy,
        memory_budget=automatic_budget(weight_VH, dtype) if memory_budget is None else memory_budget,
        sink=sink,
        needs_backward=torch.is_grad_enabled() and (hidden_NH.requires_grad or weight_VH.requires_grad),
    )
    return _FusedLogProbs.apply(hidden_NH, weight_VH, targets_N, call)


def automatic_budget(weight_VH: Tensor, dtype: torch.dtype) -> int:
    """Size a chunk so that its work is in proportion to the weight's gradient, which it reads and writes once."""
    return max(_AUTOMATIC_FLOOR, weight_VH.numel() * dtype.itemsize)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Call:
    """The settings of one call."""

    first: int
    """First token id of this rank."""
    width: int
    """Real entries of this rank."""
    group: dist.ProcessGroup | None
    scale: float
    dtype: torch.dtype
    with_entropy: bool
    memory_budget: int
    sink: GradientSink | None
    needs_backward: bool
    """Whether a backward pass may follow."""

    def chunks(self, num_rows: int, exponentials: Exponentials) -> list[slice]:
        """Cut the rows into chunks of equal size whose logits fit into the budget. The first chunk may be smaller."""
        if not num_rows:
            return []
        size = rows_of_chunks(num_rows, max(1, exponentials.num_logits(self.memory_budget) // self.width))
        return [slice(max(0, stop - size), stop) for stop in range(num_rows, 0, -size)][::-1]

    def buffer(self, chunks: list[slice], like: Tensor) -> Tensor:
        """Allocate the logits of the largest chunk."""
        rows = chunks[-1].stop - chunks[-1].start if chunks else 0
        return torch.empty(rows, self.width, dtype=self.dtype, device=like.device)

    def projection(self, weight_VH: Tensor) -> Projection:
        return Projection(weight_VH[: self.width], self.dtype, int(self.memory_budget * BLOCKS_SHARE))

    def exponentials(self, projection: Projection, device: torch.device) -> Exponentials:
        if device.type == "cuda" and self.dtype == torch.float32 and importlib.util.find_spec("triton") is not None:
            from megatron_dypo.objective import exponentials_triton

            if exponentials_triton.works_on(device):
                return exponentials_triton.TritonExponentials(projection.operand)
        return TorchExponentials(self.dtype, self.memory_budget)

    def columns(self, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return [N] the column of each target (0 for a target of another rank) and [N] whether it is on this rank."""
        local_N = targets_N - self.first
        is_here_N = (local_N >= 0) & (local_N < self.width)
        return torch.where(is_here_N, local_N, 0), is_here_N

    def reduce(self, tensor: Tensor, op: Any) -> Tensor:
        if self.group is not None and tensor.numel():
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor


class _FusedLogProbs(torch.autograd.Function):
    """The function and its backward pass. It keeps the last chunk, where the backward pass starts."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, call: _Call
    ) -> tuple[Tensor, Tensor | None]:
        projection = call.projection(weight_VH)
        exponentials = call.exponentials(projection, hidden_NH.device)
        chunks = call.chunks(len(hidden_NH), exponentials)
        buffer_RV = call.buffer(chunks, hidden_NH)
        column_N, is_here_N = call.columns(targets_N)
        rank_top_N, chosen_N, sum_N, weighted_N = hidden_NH.new_zeros(4, len(hidden_NH), dtype=call.dtype)
        chunk_RV = buffer_RV
        for rows in chunks:
            chunk_RV = buffer_RV[: rows.stop - rows.start]
            projection.logits(hidden_NH[rows], call.scale, chunk_RV)
            sums = RowSums(
                top_R=rank_top_N[rows],
                chosen_R=chosen_N[rows],
                sum_R=sum_N[rows],
                weighted_R=weighted_N[rows] if call.with_entropy else None,
            )
            exponentials.sums(chunk_RV, column_N[rows], sums)

        chosen_N.masked_fill_(~is_here_N, float("-inf"))
        top_N, chosen_N = call.reduce(torch.stack((rank_top_N, chosen_N)), dist.ReduceOp.MAX)
        # From this rank's maximum to that of all ranks.
        lift_N = rank_top_N - top_N
        weighted_N = lift_N.exp() * (weighted_N + lift_N * sum_N)
        sum_N, weighted_N = call.reduce(torch.stack((lift_N.exp() * sum_N, weighted_N)), dist.ReduceOp.SUM)

        # Σ p·s, the mean of the logits below their top under π: H = log Σ exp(s) − Σ p·s.
        mean_N = weighted_N.div_(sum_N) if call.with_entropy else None
        ctx.set_materialize_grads(False)
        ctx.call, ctx.kept = call, chunk_RV if call.needs_backward else None
        if call.needs_backward:
            ctx.lift_N = lift_N if call.group is not None else None
            ctx.save_for_backward(hidden_NH, weight_VH, column_N, is_here_N, top_N, sum_N, mean_N)
        # Not chosen − (top + log sum): that would lose the small log sum beside large logits.
        return (chosen_N - top_N) - sum_N.log(), sum_N.log() - mean_N if mean_N is not None else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_NH, weight_VH, column_N, is_here_N, top_N, sum_N, mean_N = ctx.saved_tensors
        call: _Call = ctx.call
        # d log π/d logit = onehot − exp/sum. The factor 1/sum of a row is applied to the narrow operands.
        onehot_N, factor_N1 = torch.where(is_here_N, sum_N, 0.0), (-call.scale / sum_N)[:, None]
        logp_grad_N = grads[0] if grads[0] is not None else torch.zeros_like(sum_N)
        if grads[1] is None:
            factor_N1 = factor_N1 * logp_grad_N[:, None]
        else:  # the rows are weighted by their gradients, and so is the chosen one
            onehot_N = onehot_N * logp_grad_N
        terms = RowGradients(
            column_R=column_N,
            top_R=top_N,
            lift_R=ctx.lift_N,
            onehot_R=onehot_N,
            logp_grad_R=logp_grad_N,
            entropy_grad_R=grads[1],
            mean_R=mean_N,
        )
        projection = call.projection(weight_VH)
        exponentials = call.exponentials(projection, hidden_NH.device)
        grad_NH = torch.empty_like(hidden_NH)
        total_VH = _weight_gradient(ctx, weight_VH)
        for rows, chunk_RV, has_sums in _chunks_of_logits(ctx, projection, exponentials, hidden_NH):
            grad_RV = exponentials.gradients(chunk_RV, terms.of(rows), has_sums=has_sums)
            grad_RH = projection.backward(grad_RV, hidden_NH[rows] * factor_N1[rows], total_VH)
            grad_NH[rows] = grad_RH.mul_(factor_N1[rows])
        if call.sink is not None:
            return grad_NH, call.sink.done(), None, None
        return grad_NH, total_VH.to(weight_VH.dtype) if total_VH is not None else None, None, None


def _weight_gradient(ctx: Any, weight_VH: Tensor) -> Tensor | None:
    """Return the tensor that the weight's gradient is added to; None if none is wanted."""
    if not ctx.needs_input_grad[1]:
        return None
    if ctx.call.sink is not None:
        return ctx.call.sink.total_VH
    return torch.zeros(weight_VH.shape, dtype=ctx.call.dtype, device=weight_VH.device)


def _chunks_of_logits(
    ctx: Any, projection: Projection, exponentials: Exponentials, hidden_NH: Tensor
) -> Iterator[tuple[slice, Tensor, bool]]:
    """Yield the rows of each chunk, the last chunk first; its logits; and whether those are what ``sums`` left. All
    share one buffer, which the caller may overwrite."""
    call: _Call = ctx.call
    chunks = call.chunks(len(hidden_NH), exponentials)
    if not chunks:
        return
    buffer_RV, ctx.kept = ctx.kept, None  # overwritten below; a second backward pass computes it again
    if buffer_RV is None:
        buffer_RV = call.buffer(chunks, hidden_NH)
    else:
        yield chunks.pop(), buffer_RV, True
    for rows in reversed(chunks):
        chunk_RV = buffer_RV[: rows.stop - rows.start]
        projection.logits(hidden_NH[rows], call.scale, chunk_RV)
        yield rows, chunk_RV, False
