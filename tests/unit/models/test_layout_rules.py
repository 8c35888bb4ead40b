"""Layouts that are refused, with the reason."""

import dataclasses
import subprocess
import sys

import pytest

from megatron_dypo.config.model import ParallelConfig
from megatron_dypo.models.layout_rules import check_layout
from tests.support.architectures import QWEN2 as ARCH


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"tensor": 3}, "parallel.tensor=3 does not divide num_attention_heads=28"),
        ({"tensor": 7}, "parallel.tensor=7 does not divide num_key_value_heads=4"),
        ({"pipeline": 5}, "parallel.pipeline=5 does not divide num_hidden_layers=12"),
        (
            {"pipeline": 4, "virtual_pipeline": 2},
            "parallel.pipeline × virtual_pipeline=8 does not divide num_hidden_layers=12",
        ),
    ],
)
def test_an_axis_that_does_not_divide_is_named(axes, message):
    with pytest.raises(ValueError, match=message):
        check_layout(ARCH, ParallelConfig(**axes))


def test_stages_with_layers_of_their_own_are_the_way_out_of_94_layers():
    arch, parallel = dataclasses.replace(ARCH, num_layers=94), ParallelConfig(pipeline=4)
    with pytest.raises(
        ValueError, match=r"parallel\.pipeline=4 .*=94; parallel\.first_stage_layers and parallel\.last_stage"
    ):
        check_layout(arch, parallel)
    check_layout(arch, dataclasses.replace(parallel, first_stage_layers=23, last_stage_layers=23))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"ffn_hidden_size": 97}, "parallel.tensor=4 does not divide intermediate_size=97"),
        (
            {"vocab_size": 9},
            "parallel.tensor=4: with vocab_size=9 and 3 entries for each rank, the last rank would have none",
        ),
    ],
)
def test_a_model_that_tensor_parallelism_cannot_split_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        check_layout(dataclasses.replace(ARCH, **sizes), ParallelConfig(tensor=4))


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"sequence": True}, "sequence=true: needs tensor > 1, got 1"),
        ({"virtual_pipeline": 2}, "virtual_pipeline=2: needs pipeline > 1"),
        ({"pipeline": 2, "virtual_pipeline": 1}, "virtual_pipeline=1: must be at least 2"),
        ({"first_stage_layers": 2}, "first_stage_layers=2: needs pipeline > 1"),
        ({"pipeline": 2, "virtual_pipeline": 2, "last_stage_layers": 3}, "virtual_pipeline=2 must divide it"),
        ({"context": 0}, "context=0: must be positive"),
        (
            {"num_processes": 4, "expert": 2, "expert_tensor": 4},
            "expert × expert_tensor = 2 × 4: does not divide the 4",
        ),
        (
            {"tensor": 2, "context": 2, "num_processes": 6},
            "num_processes=6: must be a multiple of tensor × pipeline × context = 2 × 1 × 2 = 4",
        ),
    ],
)
def test_axes_that_need_each_other_are_refused_apart(axes, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**axes)


@pytest.mark.parametrize("context", [2, 3, 8])
@pytest.mark.parametrize("axes", [{}, {"tensor": 4, "sequence": True}, {"pipeline": 3, "virtual_pipeline": 2}])
def test_context_parallelism_suits_every_model_and_axis(axes, context):
    check_layout(ARCH, ParallelConfig(context=context, **axes))


def test_rules_are_checked_without_torch():
    code = "import sys, megatron_dypo.models.layout_rules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
