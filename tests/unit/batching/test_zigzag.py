"""Microbatches cut over context-parallel ranks."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dypo.batching.pack import microbatch_length, pack, padded_lengths
from megatron_dypo.batching.zigzag import local_response_mask, shard, zigzag_indices, zigzag_positions
from megatron_dypo.types import Microbatch
from tests.support.objective_cases import random_groups


def make_microbatch(seed, size, spare=0):
    samples = [s for g in random_groups(seed) for s in g]
    lengths = padded_lengths(samples, 2 * size)
    return samples, pack(samples, range(len(samples)), sum(lengths) + 2 * size * spare, 2 * size)


def test_a_rank_holds_its_chunk_and_the_mirrored_one():
    assert [zigzag_positions(12, rank, 3).tolist() for rank in range(3)] == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]


def test_a_length_without_chunks_for_all_is_our_own_bug():
    with pytest.raises(AssertionError, match="multiple of 4"):
        zigzag_positions(6, 0, 2)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 4))
def test_each_token_of_a_microbatch_is_held_once_and_causal_work_is_equal(chunks, size):
    bounds = np.cumsum([0, *(2 * size * chunk for chunk in chunks)])
    held = [zigzag_indices(bounds, rank, size) for rank in range(size)]
    assert sorted(np.concatenate(held).tolist()) == list(range(bounds[-1]))
    starts = np.repeat(bounds[:-1], np.diff(bounds))
    keys_seen = [int((indices - starts[indices] + 1).sum()) for indices in held]
    assert len(set(keys_seen)) == 1


@pytest.mark.parametrize("size", [2, 3])
def test_the_cut_is_the_one_of_megatrons_rotary_embedding(size):
    from megatron.core.models.common.embeddings.rope_utils import _get_thd_freqs_on_this_cp_rank

    length = 4 * size
    table = torch.arange(length)
    for rank in range(size):
        local = torch.empty(length // size)
        theirs = _get_thd_freqs_on_this_cp_rank(rank, size, local, table)
        assert theirs.tolist() == zigzag_positions(length, rank, size).tolist()


@given(st.integers(0, 500), st.integers(1, 4), st.integers(0, 2))
@settings(max_examples=40, deadline=None)
def test_shards_hold_every_stream_of_the_microbatch_once(seed, size, spare):
    _, microbatch = make_microbatch(seed, size, spare)
    parts = [shard(microbatch, rank, size) for rank in range(size)]
    order = np.concatenate([zigzag_indices(microbatch.cu_seqlens_S, rank, size) for rank in range(size)])
    names = [field.name for field in dataclasses.fields(Microbatch) if field.name.endswith("_T")]
    assert len(names) == 6
    for name in names:
        whole = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(whole, getattr(microbatch, name)[order], err_msg=name)
    for name, stream_T in microbatch.streams.items():
        whole = np.concatenate([part.streams[name] for part in parts])
        np.testing.assert_array_equal(whole, stream_T[order], err_msg=name)
    assert {len(part.tokens_T) for part in parts} == {len(microbatch.tokens_T) // size}
    assert all(part.cu_seqlens_S is microbatch.cu_seqlens_S for part in parts)


@given(st.integers(0, 500), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_a_target_is_the_next_token_of_its_sequence_on_whichever_rank(seed, size):
    samples, microbatch = make_microbatch(seed, size)
    for part in (shard(microbatch, rank, size) for rank in range(size)):
        for t in np.flatnonzero(part.response_T):
            assert part.targets_T[t] == samples[part.sample_T[t]].tokens[part.positions_T[t] + 1]


@given(st.lists(st.integers(0, 500), min_size=0, max_size=3), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_responses_scored_by_ranks_come_back_in_order(seeds, size):
    microbatches = [make_microbatch(seed, size)[1] for seed in seeds]
    flat = np.full(sum(int(microbatch.response_T.sum()) for microbatch in microbatches), -1)
    for rank in range(size):
        parts = [shard(microbatch, rank, size) for microbatch in microbatches]
        scored = [part.targets_T[part.response_T] for part in parts]
        is_held = local_response_mask(microbatches, rank, size)
        assert (flat[is_held] == -1).all()
        flat[is_held] = np.concatenate([np.zeros(0, int), *scored])
    expected = [microbatch.targets_T[microbatch.response_T] for microbatch in microbatches]
    assert flat.tolist() == np.concatenate([np.zeros(0, int), *expected]).tolist()


def test_sequences_end_in_padding_that_is_nobodys():
    samples, microbatch = make_microbatch(0, 2)
    lengths = padded_lengths(samples, 4)
    assert microbatch.cu_seqlens_S.tolist() == np.cumsum([0, *lengths]).tolist()
    assert sum(lengths) == microbatch_length(lengths, [range(len(samples))], 4)
    starts = microbatch.cu_seqlens_S[:-1]
    for index, (sample, start, length) in enumerate(zip(samples, starts, lengths, strict=True)):
        own = np.arange(start, start + len(sample.tokens))
        padding = np.arange(own[-1] + 1, start + length)
        assert (microbatch.sample_T[own] == index).all()
        assert (microbatch.sample_T[padding] == -1).all()
        assert not microbatch.response_T[padding].any()
        assert microbatch.positions_T[start : start + length].tolist() == list(range(length))
