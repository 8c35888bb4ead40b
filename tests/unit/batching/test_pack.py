import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dypo.batching.bins import bins_best_fit, bins_within
from megatron_dypo.batching.pack import alignment, microbatch_length, num_microbatches, pack, plan_microbatches
from megatron_dypo.objective.streams import STREAMS, Stream
from tests.support.objective_cases import random_groups

OFFSETS = {"advantage": 1.0, "pg_weight": 0.5, "kl_weight": 0.25, "nll_weight": -2.0, "gal_scale": 0.125}
lengths = st.lists(st.integers(1, 40), min_size=0, max_size=40)


@given(lengths, st.integers(20, 90), st.integers(0, 4), st.booleans())
def test_planned_microbatches_hold_each_once_within_the_budget_for_any_larger_count(lengths, budget, extra, is_square):
    costs = [float(n * n) for n in lengths] if is_square else None
    count = num_microbatches(lengths, budget=budget, costs=costs) + extra
    bins = plan_microbatches(lengths, budget=budget, count=count, costs=costs)
    assert len(bins) == count
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in members) <= budget or len(members) == 1 for members in bins)
    assert bins == plan_microbatches(lengths, budget=budget, count=count, costs=costs)


def test_a_count_of_microbatches_is_kept_where_balance_finds_no_room():
    lengths, costs = [3, 3, 2, 2, 2], [1.0, 1.0, 9.0, 9.0, 9.0]
    assert bins_within(costs, lengths, count=2, capacity=6) is None
    assert plan_microbatches(lengths, budget=6, count=2, costs=costs) == [[2, 3, 4], [0, 1]]


def test_microbatches_are_added_for_balance_by_cost_and_no_more_than_one_of_few():
    assert num_microbatches([4, 3, 8], budget=8) == 2
    assert num_microbatches([4, 3, 8], budget=8, costs=[9.0, 9.0, 5.0]) == 3
    assert num_microbatches([1, 2, 1, 8], budget=8, costs=[9.0, 1.0, 5.0, 1.0]) == 2, "balance would take four"


@given(lengths, st.integers(20, 90))
def test_balance_costs_at_most_a_quarter_more_microbatches(lengths, budget):
    fewest = len(bins_best_fit(lengths, budget))
    assert fewest <= num_microbatches(lengths, budget=budget) <= fewest + max(1, fewest // 4)


@given(lengths, st.integers(40, 90))
def test_microbatches_come_costliest_first(lengths, budget):
    costs = [float(n * n) for n in lengths]
    bins = plan_microbatches(
        lengths, budget=budget, count=num_microbatches(lengths, budget=budget, costs=costs), costs=costs
    )
    work = [sum(costs[i] for i in members) for members in bins]
    assert work == sorted(work, reverse=True)


def test_microbatches_are_balanced_by_cost_where_the_budget_allows():
    # By length, [8] and [4, 4] would be equal. By length squared, one long sequence equals four of half its length.
    bins = plan_microbatches([8, 4, 4, 4, 4], budget=20, count=2, costs=[64.0, 16.0, 16.0, 16.0, 16.0])
    assert bins == [[0], [1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((1, 1), 1), ((4, 1), 4), ((1, 2), 4), ((3, 2), 12), ((8, 1, 16), 128), ((2, 4, 32), 256), ((1, 2, 3), 12)],
)
def test_alignment_divides_into_ranks_chunks_and_granules(arguments, expected):
    multiple = alignment(*arguments)
    tensor, context, granule = (*arguments, 1)[:3]
    assert multiple == expected
    assert multiple % (tensor * context * granule) == 0
    assert context == 1 or multiple % (2 * context) == 0


@pytest.mark.parametrize(("fullest", "alignment", "expected"), [(10, 4, 12), (12, 4, 12), (0, 4, 4), (7, 1, 7)])
def test_microbatches_are_rounded_up_to_the_alignment(fullest, alignment, expected):
    assert microbatch_length([fullest], [[0]] if fullest else [[]], alignment) == expected


@given(st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_every_response_token_is_the_target_of_the_position_before_it(seed):
    samples = [s for g in random_groups(seed) for s in g]
    samples = [
        dataclasses.replace(s, weights={name: i + offset for name, offset in OFFSETS.items()})
        for i, s in enumerate(samples)
    ]
    packed = pack(samples, range(len(samples)), sum(len(s.tokens) for s in samples) + 3)
    for i, sample in enumerate(samples):
        at = np.flatnonzero((packed.sample_T == i) & packed.response_T)
        assert packed.targets_T[at].tolist() == sample.tokens[sample.num_prompt_tokens :].tolist()
        assert packed.positions_T[at].tolist() == list(range(sample.num_prompt_tokens - 1, len(sample.tokens) - 1))
        for name, offset in OFFSETS.items():
            assert (packed.streams[name][at] == i + offset).all()
        if sample.old_logp is not None:
            for name in ("old_logp", "ref_logp", "rollout_logp"):
                np.testing.assert_array_equal(packed.streams[name][at], getattr(sample, name))
        assert (packed.streams["is_trace"][at] == (sample.old_logp is None)).all()
    assert packed.streams.keys() == {stream.name for stream in STREAMS}
    for stream_T in packed.streams.values():
        assert (stream_T[~packed.response_T] == 0).all()


def test_a_stream_of_ones_own_has_its_type_its_fill_and_a_value_for_each_token():
    sample, other = (s for g in random_groups(0, num_hard=2, num_mid=0) for s in g)
    own = Stream(name="rank", dtype=np.int32, fill=-7)
    values = np.arange(sample.num_response_tokens, dtype=np.int32)
    weights: dict[str, Any] = {"rank": values, "nll_weight": 0.5}
    sample = dataclasses.replace(sample, weights=weights)
    length = len(sample.tokens) + len(other.tokens) + 3
    packed = pack([sample, other], [0, 1], length, streams=(*STREAMS, own))
    at = packed.response_T & (packed.sample_T == 0)
    assert packed.streams["rank"].dtype == np.int32
    assert packed.streams["rank"][at].tolist() == values.tolist()
    assert (packed.streams["rank"][~at] == -7).all()
    assert (packed.streams["nll_weight"][at] == 0.5).all()
    assert pack([sample], [0], length, streams=()).streams == {}


def test_weights_without_a_stream_and_values_of_another_length_are_refused():
    (sample,) = random_groups(0, num_hard=1, num_mid=0)[0]
    for weights, message in (
        ({"nll_wieght": 1.0}, r"token weights \['nll_wieght'\]: no stream"),
        ({"nll_weight": np.ones(99, np.float32)}, rf"nll_weight of shape \(99,\): .*\[{sample.num_response_tokens}\]"),
    ):
        with pytest.raises(ValueError, match=message):
            pack([dataclasses.replace(sample, weights=weights)], [0], 200)


def test_what_is_left_of_a_microbatch_is_one_padding_sequence():
    sample = random_groups(0)[0][0]
    packed = pack([sample], [0], len(sample.tokens) + 5)
    assert packed.cu_seqlens_S.tolist() == [0, len(sample.tokens), len(sample.tokens) + 5]
    assert (packed.sample_T[-5:] == -1).all()
    assert packed.positions_T[-5:].tolist() == [0, 1, 2, 3, 4]


def test_an_empty_microbatch_is_all_padding():
    packed = pack([], [], 4)
    assert packed.cu_seqlens_S.tolist() == [0, 4]
    assert not packed.response_T.any()
