import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dypo.batching.pack import bins_balanced, bins_first_fit, pack, plan_microbatches, row_length
from megatron_dypo.types import TokenWeights
from tests.unit.objective_cases import random_groups

lengths = st.lists(st.integers(1, 40), min_size=0, max_size=40)


@given(lengths, st.integers(1, 60))
def test_first_fit_places_each_once_within_the_budget(lengths, budget):
    bins = bins_first_fit(lengths, budget)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    for members in bins:
        assert sum(lengths[i] for i in members) <= budget or len(members) == 1


@given(lengths, st.integers(1, 8))
def test_balanced_bins_differ_by_at_most_one_sequence(lengths, count):
    bins = bins_balanced([float(n) for n in lengths], count)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in b) for b in bins]
    assert max(loads) - min(loads) <= max(lengths, default=0)


@given(lengths, st.integers(40, 60), st.integers(0, 4))
def test_planned_microbatches_keep_the_budget_for_any_larger_count(lengths, budget, extra):
    count = max(len(bins_first_fit(lengths, budget)), 1) + extra
    bins = plan_microbatches(lengths, budget=budget, count=count)
    assert len(bins) == count
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= budget for b in bins)


@pytest.mark.parametrize(("fullest", "alignment", "expected"), [(10, 4, 12), (12, 4, 12), (0, 4, 4), (7, 1, 7)])
def test_rows_are_rounded_up_to_the_alignment(fullest, alignment, expected):
    assert row_length([fullest], [[0]] if fullest else [[]], alignment) == expected


@given(st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_every_response_token_is_the_target_of_the_position_before_it(seed):
    samples = [s for g in random_groups(seed) for s in g]
    samples = [
        dataclasses.replace(s, weights=TokenWeights(advantage=i + 1.0, surrogate=0.5, kl=0.1, nll=-i))
        for i, s in enumerate(samples)
    ]
    row = pack(samples, range(len(samples)), sum(len(s.tokens) for s in samples) + 3)
    for i, sample in enumerate(samples):
        at = np.flatnonzero((row.sample_T == i) & row.response_T)
        assert row.targets_T[at].tolist() == sample.tokens[sample.num_prompt_tokens :].tolist()
        assert row.positions_T[at].tolist() == list(range(sample.num_prompt_tokens - 1, len(sample.tokens) - 1))
        assert (row.advantage_T[at] == i + 1).all()
        assert (row.nll_T[at] == -i).all()
        if sample.old_logp is not None:
            np.testing.assert_array_equal(row.old_logp_T[at], sample.old_logp)
            np.testing.assert_array_equal(row.ref_logp_T[at], sample.ref_logp)
        assert (row.is_trace_T[at] == (sample.old_logp is None)).all()
    outside = ~row.response_T
    for name in ("advantage_T", "surrogate_T", "kl_T", "nll_T", "old_logp_T", "ref_logp_T", "rollout_logp_T"):
        assert (getattr(row, name)[outside] == 0).all()


def test_what_is_left_of_a_row_is_one_padding_sequence():
    sample = random_groups(0)[0][0]
    row = pack([sample], [0], len(sample.tokens) + 5)
    assert row.cu_seqlens_S.tolist() == [0, len(sample.tokens), len(sample.tokens) + 5]
    assert (row.sample_T[-5:] == -1).all()
    assert row.positions_T[-5:].tolist() == [0, 1, 2, 3, 4]


def test_an_empty_row_is_all_padding():
    row = pack([], [], 4)
    assert row.cu_seqlens_S.tolist() == [0, 4]
    assert not row.response_T.any()
