"""Log-prob and entropy of chosen tokens from hidden states, fused with the vocab-parallel output projection.

Logits exist for one chunk of rows at a time and are computed again in the backward pass. The tensor-parallel group is
passed in.

Shape legend: N rows (response tokens of a microbatch), R rows of one chunk, V vocabulary entries on this rank, H hidden
size; ranks hold the vocabulary in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_dypo.objective.projection import Projection

_AUTOMATIC_FLOOR = 256 * 2**20
_LOGITS_SHARE, _SCRATCH_SHARE = 0.75, 0.125


@dataclass(frozen=True, kw_only=True)
class GradientSink:
    """A tensor that accumulates the weight's gradient, in place of one of autograd's."""

    total_VH: Tensor
    """fp32 (fp64 for an fp64 weight); the gradient is added to it during the backward pass."""
    done: Callable[[], Tensor | None]
    """Called after that; autograd gets its result as the weight's gradient."""


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

    The gradient of ``hidden_NH`` is this rank's share: the caller adds it up over the group. Differentiable
    once.

    Args:
        hidden_NH: [N, H] any float type, the same on every rank of the group.
        weight_VH: [V, H] this rank's rows of the vocabulary.
        targets_N: [N] int64 token ids of the whole vocabulary.
        vocab_size: entries of the real vocabulary; rows beyond it are padding: no probability, no gradient, no cost.
        group: tensor-parallel group; None for a whole vocabulary on one rank.
        with_entropy: whether to compute the entropy.
        memory_budget: bytes of scratch beside the gradients. Sets the rows of a chunk, at least one. None: half the
            size of the weight in fp32, at least 256 MiB.
        sink: takes the weight's gradient; None: autograd does.

    Returns:
        ``logp_N`` (−inf for a target outside the vocabulary) and ``entropy_N`` (without gradient; None if not wanted);
        the same on every rank of the group.

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
    return max(_AUTOMATIC_FLOOR, weight_VH.numel() * dtype.itemsize // 2)


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

    def chunks(self, num_rows: int) -> list[slice]:
        """Cut the rows into chunks of nearly equal size, the last the largest, whose logits fit into their share."""
        most = max(1, int(self.memory_budget * _LOGITS_SHARE) // (self.width * self.dtype.itemsize))
        count = -(-num_rows // most)
        return [slice(num_rows * i // count, num_rows * (i + 1) // count) for i in range(count)]

    def buffer(self, chunks: list[slice], like: Tensor) -> Tensor:
        """Allocate the logits of the largest chunk."""
        rows = chunks[-1].stop - chunks[-1].start if chunks else 0
        return torch.empty(rows, self.width, dtype=self.dtype, device=like.device)

    def projection(self, weight_VH: Tensor) -> Projection:
        return Projection(weight_VH[: self.width], self.dtype, int(self.memory_budget * _SCRATCH_SHARE))

    def columns(self, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return [N] column of each target, and whether it is on this rank (its column is 0 if not)."""
        local_N = targets_N - self.first
        is_here_N = (local_N >= 0) & (local_N < self.width)
        return torch.where(is_here_N, local_N, 0), is_here_N

    def reduce(self, tensor: Tensor, op: Any) -> Tensor:
        if self.group is not None and tensor.numel():
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor


class _FusedLogProbs(torch.autograd.Function):
    """The function and its backward pass. It keeps the logits of the last chunk, where the backward pass starts."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, call: _Call
    ) -> tuple[Tensor, Tensor | None]:
        projection, chunks = call.projection(weight_VH), call.chunks(len(hidden_NH))
        buffer_RV = call.buffer(chunks, hidden_NH)
        column_N, is_here_N = call.columns(targets_N)
        rank_top_N, chosen_N, sum_N, weighted_N = hidden_NH.new_zeros(4, len(hidden_NH), dtype=call.dtype)
        exp_RV = buffer_RV
        for rows in chunks:
            exp_RV = buffer_RV[: rows.stop - rows.start]
            projection.logits(hidden_NH[rows], call.scale, exp_RV)
            chosen_N[rows] = exp_RV.gather(1, column_N[rows, None])[:, 0]
            torch.amax(exp_RV, dim=1, out=rank_top_N[rows])
            exp_RV -= rank_top_N[rows, None]
            _exp_and_sums(exp_RV, sum_N[rows], weighted_N[rows] if call.with_entropy else None, call)

        chosen_N.masked_fill_(~is_here_N, float("-inf"))
        top_N, chosen_N = call.reduce(torch.stack((rank_top_N, chosen_N)), dist.ReduceOp.MAX)
        # From this rank's maximum to that of all ranks.
        lift_N = rank_top_N - top_N
        weighted_N = lift_N.exp() * (weighted_N + lift_N * sum_N)
        sum_N, weighted_N = call.reduce(torch.stack((lift_N.exp() * sum_N, weighted_N)), dist.ReduceOp.SUM)

        ctx.call, ctx.kept = call, (exp_RV, lift_N) if call.needs_backward else None
        if call.needs_backward:
            ctx.save_for_backward(hidden_NH, weight_VH, column_N, is_here_N, top_N, sum_N)
        entropy_N = sum_N.log() - weighted_N / sum_N if call.with_entropy else None
        if entropy_N is not None:
            ctx.mark_non_differentiable(entropy_N)
        # Not chosen − (top + log sum), which loses what is small beside large logits.
        return (chosen_N - top_N) - sum_N.log(), entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_NH, weight_VH, column_N, is_here_N, top_N, sum_N = ctx.saved_tensors
        call: _Call = ctx.call
        chunks = call.chunks(len(hidden_NH))
        # d log π/d logit = onehot − exp/sum; the factor that is common to a row goes to the narrow operands.
        factor_N1 = (-call.scale * grads[0] / sum_N)[:, None]
        onehot_N = torch.where(is_here_N, sum_N, 0.0)
        grad_NH = torch.empty_like(hidden_NH)
        total_VH = _weight_gradient(ctx, weight_VH)
        for rows, exp_RV in _exponentials(ctx, chunks, hidden_NH, weight_VH, top_N):
            exp_RV[torch.arange(len(exp_RV), device=exp_RV.device), column_N[rows]] -= onehot_N[rows]
            hidden_RH = hidden_NH[rows] * factor_N1[rows]
            grad_RH = call.projection(weight_VH).backward(exp_RV, hidden_RH, total_VH)
            grad_NH[rows] = grad_RH.mul_(factor_N1[rows])
        if call.sink is not None:
            return grad_NH, call.sink.done(), None, None
        return grad_NH, total_VH.to(weight_VH.dtype) if total_VH is not None else None, None, None


def _exp_and_sums(shifted_RV: Tensor, sum_R: Tensor, weighted_R: Tensor | None, call: _Call) -> None:
    """Exponentiate in place; write Σ exp(s), and Σ s·exp(s) a few rows at a time, in their share of the budget."""
    if weighted_R is None:
        torch.sum(shifted_RV.exp_(), dim=1, out=sum_R)
        return
    step = max(1, int(call.memory_budget * _SCRATCH_SHARE) // (call.width * call.dtype.itemsize))
    scratch = torch.empty_like(shifted_RV[:step])
    for start in range(0, len(shifted_RV), step):
        rows = slice(start, start + step)
        shifted = scratch[: len(shifted_RV[rows])].copy_(shifted_RV[rows])
        torch.sum(shifted_RV[rows].exp_(), dim=1, out=sum_R[rows])
        torch.sum(shifted.mul_(shifted_RV[rows]), dim=1, out=weighted_R[rows])


def _weight_gradient(ctx: Any, weight_VH: Tensor) -> Tensor | None:
    """Return the tensor that the weight's gradient is added to; None if none is wanted."""
    if not ctx.needs_input_grad[1]:
        return None
    if ctx.call.sink is not None:
        return ctx.call.sink.total_VH
    return torch.zeros(weight_VH.shape, dtype=ctx.call.dtype, device=weight_VH.device)


def _exponentials(
    ctx: Any, chunks: list[slice], hidden_NH: Tensor, weight_VH: Tensor, top_N: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Yield exp(logit − top) of each chunk, the last first; all in one buffer, which the caller may overwrite."""
    if not chunks:
        return
    call: _Call = ctx.call
    kept, ctx.kept = ctx.kept, None  # overwritten below; a second backward pass computes it again
    if kept is None:
        buffer_RV = call.buffer(chunks, hidden_NH)
    else:
        buffer_RV, lift_N = kept
        last = chunks.pop()
        if call.group is not None:
            buffer_RV *= lift_N[last, None].exp()
        yield last, buffer_RV
    for rows in reversed(chunks):
        exp_RV = buffer_RV[: rows.stop - rows.start]
        call.projection(weight_VH).logits(hidden_NH[rows], call.scale, exp_RV)
        exp_RV -= top_N[rows, None]
        yield rows, exp_RV.exp_()
