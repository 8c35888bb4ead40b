"""Attention with sinks and windows against literal attention: packed, and over context-parallel ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_dypo.batching.zigzag import zigzag_indices
from megatron_dypo.mcore.attention import attend, plan
from megatron_dypo.mcore.context_attention import attend_gathered, context_plan
from megatron_dypo.mcore.sink_attention import Sinks
from tests.support.literal_attention import CPU, boundaries, literal_attention

WINDOWS = [None, 1, 4, 1000]


def drawn(num_tokens: int, heads: int, groups: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return queries, keys, values and sinks, and weights of the outputs."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()

    q, k, v = draw(num_tokens, heads, 6), draw(num_tokens, groups, 6), draw(num_tokens, groups, 6)
    return [q, k, v, draw(heads), draw(num_tokens, 6 * heads).detach()]


def outcome(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the output and its gradients with respect to queries, keys, values and sinks."""
    *leaves, weight = inputs
    return (output, *torch.autograd.grad((output * weight).sum(), leaves))


def assert_same(ours: tuple[Tensor, ...], literal: tuple[Tensor, ...]) -> None:
    for mine, expected in zip(ours, literal, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", [(1,), (5, 1, 3), (40, 2, 33, 2, 37), (3, 0, 4), (8, 8)])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (3, 1)])
def test_a_packed_row_equals_literal_attention(lengths, heads, groups, window):
    cu_seqlens = boundaries(lengths)
    inputs = drawn(cu_seqlens[-1], heads, groups)
    q, k, v, sink, _ = inputs
    ours = attend(q, k, v, plan(cu_seqlens, CPU), 0.3, Sinks(sink, window))
    literal = literal_attention(q, k, v, cu_seqlens, scale=0.3, sinks=sink, window=window)
    assert_same(outcome(ours, inputs), outcome(literal, inputs))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("chunks", [(1,), (6, 1, 5, 7, 1), (2, 0, 1)])
def test_context_parallel_ranks_together_equal_literal_attention(size, chunks, window):
    cu_seqlens = boundaries([2 * size * chunk for chunk in chunks])
    inputs = drawn(cu_seqlens[-1], 4, 2)
    q, k, v, sink, _ = inputs
    held = [zigzag_indices(cu_seqlens, rank, size) for rank in range(size)]
    gathered = np.concatenate(held)
    parts = []
    for rank in range(size):
        where = context_plan(cu_seqlens, rank, size, CPU)
        parts.append(attend_gathered(q[held[rank]], k[gathered], v[gathered], where, None, Sinks(sink, window)))
    ours = torch.cat(parts)[np.argsort(gathered)]
    literal = literal_attention(q, k, v, cu_seqlens, sinks=sink, window=window)
    assert_same(outcome(ours, inputs), outcome(literal, inputs))


def test_a_sink_keeps_its_value_in_bf16():
    """Its score is the sink divided by the scale, which bf16 rounds, times the scale."""
    length, sink, scale = 1, torch.tensor([5.03125], dtype=torch.bfloat16), 1.8132 / 8
    zero, one = torch.zeros(length, 1, 64, dtype=torch.bfloat16), torch.ones(length, 1, 64, dtype=torch.bfloat16)
    weight = attend(zero, zero, one, plan((0, length), CPU), scale, Sinks(sink, None))[0, 0]
    expected = torch.exp(-torch.logaddexp(torch.tensor(0.0), sink.float()))
    torch.testing.assert_close(weight.float(), expected[0], rtol=2**-8, atol=0)


@pytest.mark.parametrize("window", [None, 64])
def test_no_scores_of_whole_sequences_are_kept(window):
    """The output's graph keeps queries, keys, values, masks of blocks and one number a query, but no S × S scores."""
    length, heads = 2048, 2
    inputs = drawn(length, heads, 1, torch.float32)
    q, k, v, sink, _ = inputs
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attend(q, k, v, plan((0, length), CPU), None, Sinks(sink, window))
    assert sum(kept.values()) < length * length * heads
