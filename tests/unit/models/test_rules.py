"""Splitting and merging parameters, against each other and against layouts written out literally."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.families.registry import family_rows
from megatron_dypo.models.families.table import Row
from megatron_dypo.models.rules import QKV, Copy, GateUp, RowParallel, Vocab
from tests.support.architectures import make_arch, sharded_architectures


def hf_tensors(row: Row, arch: Architecture) -> list[Tensor]:
    """Make tensors of the right shapes; no two elements are equal, and none is zero."""
    tensors, start = [], 1
    for shape in row.rule.hf_shapes(arch):
        size = torch.Size(shape).numel()
        tensors.append(torch.arange(start, start + size, dtype=torch.float64).reshape(shape))
        start += size
    return tensors


def assert_all_equal(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


@given(sharded_architectures())
@settings(max_examples=60, deadline=None)
def test_merging_the_shards_is_the_identity(case):
    arch, tp_size = case
    for row in family_rows(arch):
        tensors = hf_tensors(row, arch)
        shards = [row.rule.shard(tensors, arch, rank, tp_size) for rank in range(tp_size)]
        for shard in shards:
            assert shard.is_contiguous()
            assert tuple(shard.shape) == row.rule.mcore_shape(arch, tp_size)
        assert_all_equal(row.rule.merge(shards, arch), tensors)


@given(sharded_architectures())
@settings(max_examples=60, deadline=None)
def test_shards_hold_each_element_once_and_otherwise_zeros(case):
    arch, tp_size = case
    for row in family_rows(arch):
        shards = [row.rule.shard(hf_tensors(row, arch), arch, rank, tp_size) for rank in range(tp_size)]
        if row.rule.tp_dim is None:
            shards = shards[:1]
        values = torch.cat([shard.flatten() for shard in shards])
        count = sum(torch.Size(shape).numel() for shape in row.rule.hf_shapes(arch))
        assert values[values != 0].sort().values.tolist() == list(range(1, count + 1))


@given(sharded_architectures())
@settings(max_examples=60, deadline=None)
def test_the_stored_tensor_does_not_depend_on_tensor_parallelism(case):
    arch, tp_size = case
    for row in family_rows(arch):
        tensors = hf_tensors(row, arch)
        dim = row.rule.tp_dim or 0
        stored = torch.full(row.rule.stored_shape(arch, tp_size), -1.0, dtype=torch.float64)
        outputs = [torch.full_like(tensor, -1.0) for tensor in tensors]
        for rank in range(tp_size):
            shard = row.rule.shard(tensors, arch, rank, tp_size)
            for chunk in row.rule.chunks(arch, rank, tp_size):
                part = shard.narrow(dim, chunk.local_start, chunk.length)
                stored.narrow(dim, chunk.stored_start, chunk.length).copy_(part)
                start = [0] * stored.dim()
                start[dim] = chunk.stored_start
                row.rule.scatter(part, tuple(start), outputs, arch)
        whole = row.rule.shard(tensors, arch, 0, 1)
        assert torch.equal(stored.narrow(dim, 0, whole.shape[dim]), whole)
        assert not stored.narrow(dim, whole.shape[dim], stored.shape[dim] - whole.shape[dim]).any()
        assert_all_equal(outputs, tensors)


def test_qkv_interleaves_the_heads_of_each_group():
    arch = make_arch(num_attention_heads=4, num_key_value_heads=2, head_dim=1, hidden_size=1)
    query, key, value = (
        torch.tensor([[10.0], [11], [12], [13]]),
        torch.tensor([[20.0], [21]]),
        torch.tensor([[30.0], [31]]),
    )
    whole = QKV().shard([query, key, value], arch, 0, 1)
    assert whole.flatten().tolist() == [10, 11, 20, 30, 12, 13, 21, 31]
    assert QKV().shard([query, key, value], arch, 1, 2).flatten().tolist() == [12, 13, 21, 31]
    bias = QKV(bias=True).shard([query[:, 0], key[:, 0], value[:, 0]], arch, 0, 2)
    assert bias.tolist() == [10, 11, 20, 30]


def test_gate_and_up_are_halves_of_each_rank():
    arch = make_arch(ffn_hidden_size=4, hidden_size=1, num_attention_heads=2, num_key_value_heads=2)
    gate, up = torch.arange(4.0)[:, None], torch.arange(10.0, 14.0)[:, None]
    assert GateUp().shard([gate, up], arch, 1, 2).flatten().tolist() == [2, 3, 12, 13]


def test_vocabulary_is_padded_with_zero_rows_and_a_rank_may_hold_padding_only():
    arch = make_arch(vocab_size=5, hidden_size=1)
    embedding = torch.arange(1.0, 6.0)[:, None]
    shards = [Vocab().shard([embedding], arch, rank, 4).flatten().tolist() for rank in range(4)]
    assert shards == [[1, 2], [3, 4], [5, 0], [0, 0]]


def test_row_parallel_splits_input_features():
    arch = make_arch(num_attention_heads=2, num_key_value_heads=2, head_dim=1, hidden_size=2, ffn_hidden_size=2)
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert RowParallel(lambda arch: (2, 2)).shard([weight], arch, 1, 2).tolist() == [[2], [4]]


def test_copy_gives_every_rank_the_whole_tensor():
    arch = make_arch(hidden_size=3)
    norm = torch.arange(3.0)
    for rank in range(2):
        assert Copy(lambda arch: (3,)).shard([norm], arch, rank, 2).tolist() == [0, 1, 2]


def test_ranks_beyond_the_groups_take_equal_runs_of_the_same_rows():
    arch = make_arch(num_attention_heads=4, num_key_value_heads=1, head_dim=2, hidden_size=1)
    tensors = [torch.arange(start, start + rows)[:, None] for start, rows in ((10, 8), (20, 2), (30, 2))]
    shards = [QKV().shard(tensors, arch, rank, 4).flatten().tolist() for rank in range(4)]
    assert shards == [[10, 11, 12], [13, 14, 15], [16, 17, 20], [21, 30, 31]]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "message"),
    [
        (6, 2, "tensor_parallel=4 does not divide num_attention_heads=6"),
        (12, 3, "tensor_parallel=4 does not divide num_key_value_heads=3, nor the reverse"),
    ],
)
def test_ranks_that_cannot_share_heads_are_refused(heads, kv_heads, message):
    arch = make_arch(num_attention_heads=heads, num_key_value_heads=kv_heads)
    with pytest.raises(ValueError, match=message):
        QKV().pieces(arch, 0, 4)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (GateUp(), "tensor_parallel=4 does not divide ffn_hidden_size=30"),
        (RowParallel(lambda arch: (2, 6)), "tensor_parallel=4 does not divide input features=6"),
    ],
)
def test_a_size_that_does_not_divide_is_refused(rule, message):
    arch = make_arch(num_key_value_heads=2, ffn_hidden_size=30)
    with pytest.raises(ValueError, match=message):
        rule.shard([torch.zeros(shape) for shape in rule.hf_shapes(arch)], arch, 0, 4)
