"""Samples as bytes: every field and every token weight, bit for bit."""

import dataclasses

import numpy as np

from megatron_dypo.batching.wire import dump_samples, load_samples
from tests.support.objective_cases import random_groups


def assert_same(one, other, name):
    if isinstance(one, np.ndarray):
        np.testing.assert_array_equal(one, other, strict=True, err_msg=name)
    else:
        assert one == other, name


def test_samples_survive_the_wire_bit_for_bit():
    samples = [s for g in random_groups(7) for s in g]
    weights = {"advantage": 0.1, "nll_weight": -1 / 3, "gal_scale": 0.2}
    samples[0] = dataclasses.replace(samples[0], weights=weights, current_logp_sum=-3.7, reward=0.1)
    restored = load_samples(dump_samples(samples))
    assert len(restored) == len(samples)
    for before, after in zip(samples, restored, strict=True):
        for field in dataclasses.fields(before):
            assert_same(getattr(before, field.name), getattr(after, field.name), field.name)
    assert load_samples(dump_samples([])) == []


def test_weights_of_any_stream_are_carried_numbers_and_one_for_each_token():
    sample = random_groups(7)[-1][0]
    per_token = np.linspace(0, 1, sample.num_response_tokens, dtype=np.float32)
    weights = {"shape": 0.25, "credit.of.step": per_token, "rank": per_token.astype(np.int32), "scale": np.float32(0.1)}
    (restored,) = load_samples(dump_samples([dataclasses.replace(sample, weights=weights)]))
    assert restored.weights.keys() == weights.keys()
    for name, value in weights.items():
        assert_same(value, restored.weights[name], name)
    for bare in (None, {}):
        assert load_samples(dump_samples([dataclasses.replace(sample, weights=bare)]))[0].weights == bare
