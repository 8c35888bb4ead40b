"""Times of the plan against published times, and laws that they obey."""

import dataclasses

import pytest

from megatron_dypo.planning.rollouts import rollout_round
from megatron_dypo.planning.scaling import best_split, splits, weak_scaling
from megatron_dypo.planning.schedule import pipeline_seconds
from megatron_dypo.planning.serving import decode_step_s, make_server
from megatron_dypo.planning.step import refit_time, step_time
from megatron_dypo.planning.training import update_time
from tests.support.planning_cases import architecture, from_file, pretraining

PUBLISHED = {
    "22B": ({"num_layers": 48, "hidden_size": 6144}, 64, {"tensor": 8}, 8, 4, 4, 1.10),
    "175B": (
        {"num_layers": 96, "hidden_size": 12_288},
        96,
        {"tensor": 8, "pipeline": 8, "virtual_pipeline": 3},
        64,
        64,
        1,
        13.75,
    ),
    "530B": (
        {"num_layers": 105, "hidden_size": 20_480},
        128,
        {"tensor": 8, "pipeline": 35, "virtual_pipeline": 3},
        280,
        280,
        1,
        37.83,
    ),
    "1T": ({"num_layers": 128, "hidden_size": 25_600}, 160, {"tensor": 8, "pipeline": 64}, 512, 512, 1, 71.49),
}
"""Sizes, heads, axes, A100s, sequences of 2,048 a step and a row, seconds (Korthikanti et al. 2022, tables 3 and 5)."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_update_takes_what_korthikanti_publish_within_15_percent(name):
    sizes, heads, parallel, gpus, batch, row_sequences, seconds = PUBLISHED[name]
    arch = architecture(**sizes, num_attention_heads=heads, num_key_value_heads=heads)
    parallel = {**parallel, "sequence": True}
    setting = pretraining(arch, parallel, gpus=gpus, batch=batch, row_sequences=row_sequences)
    assert update_time(setting).total == pytest.approx(seconds, rel=0.15)


@pytest.mark.parametrize(("virtual", "rows"), [(1, 1), (1, 8), (3, 8)])
def test_equal_stages_are_idle_for_the_published_share(virtual, rows):
    """(p − 1)/(m·v) of the work (Narayanan et al. 2021, section 2.2)."""
    seconds = pipeline_seconds([2.0] * 4, virtual_pipeline=virtual, microbatches=rows)
    assert seconds == pytest.approx(2.0 * (1 + 3 / (rows * virtual)))


def test_the_stage_with_the_most_layers_sets_the_pace():
    uneven = ("parallel.first_stage_layers=17", "parallel.last_stage_layers=15")  # 24 on the two between, not 20
    times = [
        update_time(from_file("llama3_70b", *overrides, "batching.prompts_per_update=4096"))
        for overrides in ((), uneven)
    ]
    even, slowed = (time.total - time.data - time.optimizer for time in times)
    assert slowed == pytest.approx(even * 24 / 20, rel=0.01)


def test_kv_cache_of_llama_3_70b_is_320_kib_a_token():
    setting = from_file("llama3_70b")
    assert make_server(setting).kv_bytes_per_token * 8 == 320 * 1024
    wider = from_file("llama3_70b", "rollout.servers.tensor_parallel=16")
    assert make_server(wider).kv_bytes_per_token * 8 == 320 * 1024, "8 heads are no fewer on 16 GPUs"


def test_decoding_is_bound_by_weights_until_the_batch_is_large():
    setting = from_file("llama3_70b")
    server = make_server(setting)
    alone, few, many = (decode_step_s(setting, server, batch) for batch in (1, 8, 512))
    assert few < 1.1 * alone
    assert 1.5 * alone < many < 512 * alone


def test_the_longest_response_bounds_a_round_from_below():
    setting = from_file("llama3_70b")
    bound = setting.config.rollout.max_new_tokens * decode_step_s(setting, make_server(setting), 1)
    many = dataclasses.replace(setting, num_servers=10_000)
    assert rollout_round(setting).seconds > rollout_round(many).seconds >= bound


def test_shards_reach_the_servers_sooner_than_whole_tensors():
    broadcast, disk = (refit_time(from_file("llama3_70b", f"refit.transport={name}")) for name in ("broadcast", "disk"))
    assert broadcast < disk
    # The model's bytes go once through one port of at most 50 GB/s.
    assert broadcast >= 2 * 70.55e9 / 50e9


def test_idle_shares_are_what_the_other_role_takes():
    time = step_time(from_file("llama3_70b"))
    assert time.trainer_idle + time.rollout_idle + time.refit / time.total == pytest.approx(1)
    assert time.total == pytest.approx(time.rollout + time.trainer + time.refit)


def test_the_best_division_is_no_slower_than_the_given_one():
    setting = from_file("llama3_70b")
    given = step_time(setting)
    assert best_split(setting, overlapped=False).time.total <= given.total
    assert best_split(setting, overlapped=True).time.overlapped <= given.overlapped
    assert all(split.trainer_gpus + split.rollout_gpus == 96 for split in splits(setting))


def test_a_division_leaves_the_trainer_room():
    """Half the replicas hold twice the optimizer: on GPUs of 40 GB fewer divisions fit."""
    large, small = (splits(from_file("llama3_70b", gpu=gpu)) for gpu in ("h100-80gb", "a100-40gb"))
    assert {s.trainer_gpus for s in small} < {s.trainer_gpus for s in large}


def test_weak_scaling_reaches_4096_gpus_with_work_in_proportion():
    rows = weak_scaling(from_file("llama3_70b"))
    assert [row.gpus for row in rows] == [16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
    assert rows[0].split is None, "70B does not train on 16 GPUs of which some serve"
    tokens = {row.gpus: row.split.time.tokens for row in rows if row.split}
    assert tokens[4096] == pytest.approx(32 * tokens[128], rel=0.02)
