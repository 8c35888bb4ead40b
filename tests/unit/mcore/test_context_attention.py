"""Attention over context-parallel ranks, in one process, against literal attention over the whole row."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dypo.batching.zigzag import zigzag_indices
from megatron_dypo.mcore.context_attention import attend_gathered, context_plan
from tests.support.literal_attention import CPU, boundaries, literal_attention


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("chunks", [(1,), (1, 2, 1), (6, 1, 5, 7, 1), (2, 0, 1)])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2)])
def test_output_and_gradients_equal_literal_attention(size, chunks, heads, groups):
    generator = torch.Generator().manual_seed(0)
    cu_seqlens = boundaries([2 * size * chunk for chunk in chunks])

    def draw(h):
        return torch.randn(cu_seqlens[-1], h, 6, dtype=torch.float64, generator=generator, requires_grad=True)

    q, k, v, weight = draw(heads), draw(groups), draw(groups), draw(heads).detach().flatten(1)
    held = [zigzag_indices(cu_seqlens, rank, size) for rank in range(size)]
    gathered = np.concatenate(held)
    parts = [
        attend_gathered(q[held[rank]], k[gathered], v[gathered], context_plan(cu_seqlens, rank, size, CPU))
        for rank in range(size)
    ]
    ours = torch.cat(parts)[np.argsort(gathered)]
    results = []
    for output in (ours, literal_attention(q, k, v, cu_seqlens)):
        results.append((output, *torch.autograd.grad((output * weight).sum(), (q, k, v))))
    for mine, literal in zip(*results, strict=True):
        torch.testing.assert_close(mine, literal, atol=1e-12, rtol=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=20).filter(any), st.integers(2, 4))
def test_plans_of_all_ranks_answer_for_each_token_once(chunks, size):
    cu_seqlens = boundaries([2 * size * chunk for chunk in chunks])
    num_local = cu_seqlens[-1] // size
    for rank in range(size):
        where = context_plan(cu_seqlens, rank, size, CPU)
        padded = torch.cat([bucket.query_N for bucket in where.buckets])
        assert padded[where.slot_T].tolist() == list(range(num_local))
        for bucket in where.buckets:
            assert len(bucket.key_N) == size * len(bucket.query_N)
