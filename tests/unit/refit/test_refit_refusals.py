"""Layouts without a plan, and the messages that refuse them."""

from __future__ import annotations

import re
from typing import Any

import pytest

from megatron_dypo.refit.plan.refit_plan import Mesh, ServerMesh, make_plan
from tests.support.architectures import make_arch
from tests.support.refit_cases import qwen3_moe_experts


@pytest.mark.parametrize(
    ("source", "server", "message"),
    [
        ({"tensor": 3}, {}, "tensor_parallel=3 does not divide num_attention_heads=8"),
        ({"pipeline": 3}, {}, "parallel.pipeline=3 does not divide num_hidden_layers=4"),
        (
            {"pipeline": 2, "virtual_pipeline": 4},
            {},
            "parallel.pipeline × virtual_pipeline=8 does not divide num_hidden_layers=4",
        ),
        ({"pipeline": 2, "first_stage_layers": 4}, {}, "first_stage_layers=4: leaves none of num_hidden_layers=4"),
        ({}, {"tensor": 5}, "server tensor=5: does not divide num_attention_heads=8"),
        ({}, {"tensor": 0}, "tensor=0: must be positive"),
        ({}, {"tensor": 2, "expert": 2}, "server expert=2: a llama model has no experts"),
    ],
)
def test_a_dense_layout_that_does_not_fit_is_refused(source, server, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_plan(make_arch(), Mesh(**source), [ServerMesh(**{"tensor": 1, **server})])


@pytest.mark.parametrize(
    ("source", "server", "message"),
    [
        ({"data": 3, "expert": 3}, {}, "expert=3: does not divide num_experts=4"),
        ({"data": 2, "expert_tensor": 2}, {}, "tensor_parallel=2 does not divide ffn_hidden_size=7"),
        ({}, {"tensor": 4, "expert": 3}, "server expert=3: does not divide server tensor=4"),
        ({}, {"tensor": 8, "expert": 8}, "server expert=8: does not divide num_experts=4"),
        ({}, {"tensor": 4, "expert": 2}, "server tensor=2: does not divide moe_intermediate_size=7"),
    ],
)
def test_a_layout_of_experts_that_does_not_fit_is_refused(source, server, message):
    arch = make_arch("qwen3_moe", experts=qwen3_moe_experts(4, 7))
    with pytest.raises(ValueError, match=re.escape(message)):
        make_plan(arch, Mesh(**source), [ServerMesh(**{"tensor": 1, **server})])


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"tensor": 0}, "tensor=0: must be positive"),
        ({"tensor": 2, "expert": 3}, "expert × expert_tensor = 3 × 1: does not divide the 2 ranks of a pipeline stage"),
        ({"last_stage_layers": 4}, "last_stage_layers=4: needs pipeline > 1"),
    ],
)
def test_axes_that_contradict_each_other_are_refused(axes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        Mesh(**axes)


SIZES: dict[str, Any] = {"head_dim": 64, "hidden_size": 256, "ffn_hidden_size": 512}


@pytest.mark.parametrize(
    ("sizes", "tensor", "server", "message"),
    [
        (SIZES, 1, 1, "v_proj.weight: the trainer's tensor shard 0 of 1 holds 64 × 256 of it, row=192"),
        ({**SIZES, "head_dim": 128, "ffn_hidden_size": 384}, 2, 1, "up_proj.weight: the trainer's tensor shard 0 of 2"),
        (
            {**SIZES, "head_dim": 128, "ffn_hidden_size": 384},
            1,
            2,
            "up_proj.weight: rank 0 of 2 of a server holds 192",
        ),
        ({**SIZES, "head_dim": 128, "ffn_hidden_size": 384}, 1, 2, "fp8_block needs cuts at multiples of 128"),
    ],
)
def test_a_cut_through_a_block_of_scales_is_refused(sizes, tensor, server, message):
    source, servers = Mesh(tensor=tensor), [ServerMesh(tensor=server)]
    make_plan(make_arch(**sizes), source, servers, quantization="fp8_channel")
    with pytest.raises(ValueError, match=re.escape(message)):
        make_plan(make_arch(**sizes), source, servers, quantization="fp8_block")


def test_ranks_and_servers_that_do_not_exist_are_refused():
    made = make_plan(make_arch(), Mesh(), [ServerMesh(tensor=2)])
    with pytest.raises(ValueError, match="rank=1: must be below 1"):
        made.sends(1)
    with pytest.raises(ValueError, match="server_rank=2: must be below 2"):
        made.receives(0, 2)
    with pytest.raises(ValueError, match="servers=\\(\\): name at least one"):
        make_plan(make_arch(), Mesh(), [])
