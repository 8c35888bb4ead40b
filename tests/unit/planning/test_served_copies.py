"""The estimate of servers with copies of attention (``--attn-dp-size``)."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_dypo.models.architecture import Architecture
from megatron_dypo.planning.parameters import served_bytes
from megatron_dypo.planning.serving import decode_step_s, make_server, server_footprint
from megatron_dypo.planning.setting import Setting
from megatron_dypo.planning.step import refit_time
from megatron_dypo.refit.plan.refit_plan import Mesh, make_plan
from megatron_dypo.refit.plan.server_mesh import ServerMesh
from tests.support.planning_cases import from_file

COPIES = "rollout.servers.extra_args=[--attn-dp-size,'4']"
NAME = "qwen3_235b_a22b"


def setting(*overrides: str) -> Setting:
    return from_file(NAME, "rollout.servers.tensor_parallel=8", *overrides)


def held_bytes(arch: Architecture, mesh: ServerMesh) -> int:
    """Return the bytes that a refit sends to a server: all that it holds."""
    return sum(make_plan(arch, Mesh(), [mesh], element_size=2).link_bytes().values())


def test_copies_hold_attention_and_the_embedding_again() -> None:
    arch = setting().arch
    small = dataclasses.replace(arch, num_layers=2, vocab_size=8192)
    assert arch.experts is not None
    for copies in (1, 4):
        # The key and value heads and the norms, which ranks hold again, are left out of the estimate.
        exact = held_bytes(small, ServerMesh(tensor=4, attention_data=copies))
        assert served_bytes(small, 2, "none", copies).total == pytest.approx(exact, rel=2e-3)


def test_each_copy_has_the_cache_of_its_own_requests() -> None:
    plain, spread = make_server(setting()), make_server(setting(COPIES))
    assert spread.weights_per_gpu > plain.weights_per_gpu
    # Four heads of keys over eight ranks: each head is there twice. Over two ranks each has two heads, and once.
    assert spread.kv_bytes_per_token == 2 * plain.kv_bytes_per_token
    room = plain.kv_tokens * plain.kv_bytes_per_token - (spread.weights_per_gpu - plain.weights_per_gpu)
    assert spread.kv_tokens_per_copy == pytest.approx(room / spread.kv_bytes_per_token)
    assert spread.kv_tokens == 4 * spread.kv_tokens_per_copy
    assert spread.kv_tokens > plain.kv_tokens


def test_the_footprint_is_that_of_one_gpu() -> None:
    footprint, server = server_footprint(setting(COPIES)), make_server(setting(COPIES))
    assert footprint["KV cache"] == pytest.approx(server.kv_tokens_per_copy * server.kv_bytes_per_token)
    assert footprint.spare >= 0


def test_a_step_reads_the_cache_of_a_copys_requests() -> None:
    made = setting(COPIES)
    server = make_server(made)
    one = dataclasses.replace(server, copies=1)
    assert decode_step_s(made, server, 256, 8000) < decode_step_s(made, one, 256, 8000)


def test_a_planned_refit_sends_the_copies_too() -> None:
    p2p = "refit.transport=p2p"
    assert refit_time(setting(COPIES, p2p)) > refit_time(setting(p2p))
    broadcast = "refit.transport=broadcast"
    assert refit_time(setting(COPIES, broadcast)) == refit_time(setting(broadcast))


def test_copies_that_do_not_suit_the_gpus_are_refused_by_their_numbers() -> None:
    with pytest.raises(ValueError, match=r"^server attn_dp_size=4: does not divide server tensor=2$"):
        make_server(from_file(NAME, "rollout.servers.tensor_parallel=2", COPIES))
