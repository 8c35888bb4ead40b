"""Laws that planned times obey; ``test_published_steps.py`` compares them with measured ones."""

import dataclasses
from dataclasses import replace

import pytest

from megatron_dypo.planning.rollouts import rollout_round
from megatron_dypo.planning.scaling import best_split, splits, weak_scaling
from megatron_dypo.planning.schedule import pipeline_seconds
from megatron_dypo.planning.serving import decode_step_s, make_server
from megatron_dypo.planning.step import refit_time, step_time
from megatron_dypo.planning.training import update_time
from tests.support.planning_cases import from_file


@pytest.mark.parametrize(("virtual", "rows"), [(1, 1), (1, 8), (3, 8)])
def test_equal_stages_are_idle_for_the_published_share(virtual, rows):
    """(p − 1)/(m·v) of the work (Narayanan et al. 2021, section 2.2)."""
    seconds = pipeline_seconds([2.0] * 4, virtual_pipeline=virtual, microbatches=rows)
    assert seconds == pytest.approx(2.0 * (1 + 3 / (rows * virtual)))


def test_the_stage_with_the_most_layers_sets_the_pace():
    uneven = ("parallel.first_stage_layers=17", "parallel.last_stage_layers=15")  # 24 on the two between, not 20
    times = [
        update_time(replace(from_file("llama3_70b", *overrides, "batching.prompts_per_update=4096"), output_passes=0))
        for overrides in ((), uneven)
    ]
    even, slowed = (time.total - time.data - time.optimizer for time in times)
    assert slowed == pytest.approx(even * 24 / 20, rel=0.01)


def test_the_output_layer_is_work_of_the_last_stage():
    """So the last of equal stages is the slowest, and with a large vocabulary fewer layers on it are faster."""
    many = "batching.prompts_per_update=4096"
    settings = [from_file("llama3_70b", many, *overrides) for overrides in ((), ("parallel.last_stage_layers=17",))]
    even, uneven = (
        update_time(replace(setting, arch=replace(setting.arch, vocab_size=400_000))).total for setting in settings
    )
    assert uneven < even
    assert update_time(replace(settings[0], balanced_output=True)).total < update_time(settings[0]).total


def test_launches_bound_a_layer_from_below_and_cost_nothing_beside_more_work():
    """Microbatches of a few tokens wait for the host; long ones do not."""
    few, many = (
        update_time(from_file("llama3_70b", f"batching.tokens_per_microbatch={tokens}", "rollout.max_new_tokens=64"))
        for tokens in (64, 16_384)
    )
    assert few.launches > 10 * few.compute
    assert many.launches == 0


def test_ranks_of_a_node_exchange_tokens_faster_and_kernels_that_send_once_do_so_between_nodes():
    base = ("batching.prompts_per_update=4096",)
    wide, near, fused = (
        update_time(from_file("qwen3_235b_a22b", *base, *axes)).expert
        for axes in ((), ("parallel.expert=8",), ("parallel.expert_dispatcher=deepep",))
    )
    assert near < wide / 5
    assert near < fused < wide / 2


def test_a_reduction_that_overlaps_is_hidden_by_a_microbatch():
    shown, hidden = (
        update_time(from_file("llama3_70b", "optimizer.distributed=true", f"optimizer.overlap_grad_reduce={flag}")).data
        for flag in ("false", "true")
    )
    assert hidden < shown


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
    assert time.trainer_idle + time.rollout_idle + time.common / time.total == pytest.approx(1)
    assert time.total == pytest.approx(time.rollout + time.trainer + time.common)


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
