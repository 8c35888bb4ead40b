"""Packed attention against literal attention without packing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dypo.mcore.attention import FILL, SHORT, attend, packed_seq_params, plan
from tests.support.literal_attention import CPU, boundaries, literal_attention


@pytest.mark.parametrize("lengths", [(1,), (5, 1, 3), (40, 2, 33, 2, 37), (3, 0, 4)])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (3, 1)])
def test_output_and_gradients_equal_literal_attention(lengths, heads, groups):
    generator = torch.Generator().manual_seed(0)
    cu_seqlens = boundaries(lengths)

    def draw(h):
        return torch.randn(cu_seqlens[-1], h, 6, dtype=torch.float64, generator=generator, requires_grad=True)

    q, k, v, weight = draw(heads), draw(groups), draw(groups), draw(heads).detach().flatten(1)
    results = []
    for output in (attend(q, k, v, plan(cu_seqlens, CPU)), literal_attention(q, k, v, cu_seqlens)):
        results.append((output, *torch.autograd.grad((output * weight).sum(), (q, k, v))))
    for ours, literal in zip(*results, strict=True):
        torch.testing.assert_close(ours, literal, atol=1e-12, rtol=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=30).filter(any))
def test_plan_holds_each_token_once_and_wastes_little(lengths):
    cu_seqlens = boundaries(lengths)
    where = plan(cu_seqlens, CPU)
    padded = torch.cat([bucket.gather_N for bucket in where.buckets])
    assert padded[where.slot_T].tolist() == list(range(cu_seqlens[-1]))
    for bucket in where.buckets:
        assert bucket.length <= SHORT or FILL * bucket.length * bucket.num_sequences <= len(
            set(bucket.gather_N.tolist())
        )


def test_one_long_sequence_does_not_pad_the_short_ones():
    where = plan(boundaries([1000, *[20] * 30]), CPU)
    assert [(bucket.num_sequences, bucket.length) for bucket in where.buckets] == [(1, 1000), (30, 20)]


def test_packed_seq_params_describe_the_row():
    params = packed_seq_params(torch.tensor([0, 3, 10, 12]))
    assert params.qkv_format == "thd"
    assert params.cu_seqlens_q.dtype == torch.int32
    assert params.cu_seqlens_q.tolist() == [0, 3, 10, 12]
    assert params.max_seqlen_q == 7


def test_shorter_values_need_no_scores_of_whole_sequences():
    """torch's kernels without S × S scores take one size of heads only."""
    lengths, generator = (64, 48), torch.Generator().manual_seed(1)
    cu_seqlens = boundaries(lengths)

    def draw(channels):
        return torch.randn(cu_seqlens[-1], 2, channels, dtype=torch.float64, generator=generator, requires_grad=True)

    q, k, v = draw(6), draw(6), draw(4)
    saved: list[torch.Tensor] = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = attend(q, k, v, plan(cu_seqlens, CPU))
    assert not [tuple(t.shape) for t in saved if t.dim() > 1 and tuple(t.shape[-2:]) == (64, 64)]
    results = [(output, *torch.autograd.grad(output.square().sum(), (q, k, v)))]
    literal = literal_attention(q, k, v, cu_seqlens)
    results.append((literal, *torch.autograd.grad(literal.square().sum(), (q, k, v))))
    assert output.shape == (cu_seqlens[-1], 2 * 4)
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)
