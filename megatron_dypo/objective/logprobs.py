"""Log-prob and entropy of chosen tokens from vocab-parallel logits; the tensor-parallel group is an argument.

Shape legend: N rows (response tokens of a microbatch), V vocabulary entries on this rank, ranks in order of the
vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def vocab_parallel_logprobs(
    logits_NV: Tensor,
    target_N: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """log π(target) and the entropy of π, in fp32 (fp64 for fp64 logits).

    Args:
        logits_NV: [N, V] this rank's columns; any float type.
        target_N: [N] int64 token ids of the whole vocabulary.
        vocab_size: entries of the real vocabulary; columns beyond it are padding and have no probability.
        group: tensor-parallel group; None for a whole vocabulary on one rank.

    Returns:
        ``logp_N`` (differentiable by the logits) and ``entropy_N`` (for the log, without gradient); the same on
        every rank of the group.
    """
    return _VocabParallelLogProbs.apply(logits_NV, target_N, vocab_size, group)


class _VocabParallelLogProbs(torch.autograd.Function):
    """Keeps the softmax for the backward pass; one all-reduce for the maximum, one for all three sums."""

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, target_N: Tensor, vocab_size: int, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        width = logits_NV.shape[1]
        first = width * (group.rank() if group is not None else 0)
        shifted_NV = logits_NV.to(torch.float64 if logits_NV.dtype == torch.float64 else torch.float32, copy=True)
        if first + width > vocab_size:
            shifted_NV[:, max(vocab_size - first, 0) :] = float("-inf")
        top_N = _all_reduce(shifted_NV.amax(dim=1), dist.ReduceOp.MAX, group)
        shifted_NV -= top_N[:, None]

        local_N = target_N - first
        is_here_N = (local_N >= 0) & (local_N < width)
        row_N = torch.arange(len(target_N), device=target_N.device)
        column_N = local_N.clamp(0, width - 1)
        chosen_N = torch.where(is_here_N, shifted_NV[row_N, column_N], 0.0)

        exp_NV = shifted_NV.exp()
        # 0·(−inf) of the padding is 0 in the entropy, not NaN
        weighted_N = torch.nan_to_num_(shifted_NV.mul_(exp_NV), nan=0.0).sum(dim=1)
        sums_3N = _all_reduce(torch.stack((exp_NV.sum(dim=1), chosen_N, weighted_N)), dist.ReduceOp.SUM, group)
        sum_N, chosen_N, weighted_N = sums_3N
        log_sum_N = sum_N.log()

        ctx.save_for_backward(exp_NV.div_(sum_N[:, None]), row_N, column_N, is_here_N)
        ctx.logits_dtype = logits_NV.dtype
        entropy_N = log_sum_N - weighted_N / sum_N
        ctx.mark_non_differentiable(entropy_N)
        return chosen_N - log_sum_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        softmax_NV, row_N, column_N, is_here_N = ctx.saved_tensors
        grad_N = grads[0]
        grad_NV = softmax_NV * -grad_N[:, None]
        grad_NV[row_N, column_N] += torch.where(is_here_N, grad_N, 0.0)
        return grad_NV.to(ctx.logits_dtype), None, None, None


def _all_reduce(tensor: Tensor, op: Any, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor
