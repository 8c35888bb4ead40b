"""Samples as bytes: every field and every token weight, bit for bit."""

import dataclasses
from typing import Any

import numpy as np

from megatron_dypo.batching.wire import dump_samples, load_samples
from tests.support.objective_cases import random_groups
from tests.support.present import present


def assert_same(one, other, name):
    if isinstance(one, np.ndarray):
        np.testing.assert_array_equal(one, other, strict=True, err_msg=name)
    else:
        assert one == other, name


def test_samples_survive_the_wire_bit_for_bit():
    samples = [s for g in random_groups(7) for s in g]
    weights = {"advantage": 0.1, "nll_weight": -1 / 3, "gal_scale": 0.2}
    routes = np.random.default_rng(0).integers(0, 60_000, (4, 3, 2), dtype=np.uint16)
    samples[0] = dataclasses.replace(samples[0], weights=weights, current_logp_sum=-3.7, logp_version=3, routes=routes)
    restored = load_samples(dump_samples(samples))
    assert len(restored) == len(samples)
    for before, after in zip(samples, restored, strict=True):
        for field in dataclasses.fields(before):
            assert_same(getattr(before, field.name), getattr(after, field.name), field.name)
    assert load_samples(dump_samples([])) == []


def test_weights_of_any_stream_are_carried_numbers_and_one_for_each_token():
    sample = random_groups(7)[-1][0]
    per_token = np.linspace(0, 1, sample.num_response_tokens, dtype=np.float32)
    weights: dict[str, Any] = {
        "shape": 0.25,
        "credit.of.step": per_token,
        "rank": per_token.astype(np.int32),
        "scale": np.float32(0.1),
    }
    (restored,) = load_samples(dump_samples([dataclasses.replace(sample, weights=weights)]))
    assert present(restored.weights).keys() == weights.keys()
    for name, value in weights.items():
        assert_same(value, present(restored.weights)[name], name)
    bare: dict[str, float] | None
    for bare in (None, {}):
        assert load_samples(dump_samples([dataclasses.replace(sample, weights=bare)]))[0].weights == bare
