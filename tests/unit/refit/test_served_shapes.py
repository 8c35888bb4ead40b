"""Messages about a server rank whose parameters differ from the plan."""

from __future__ import annotations

import pytest

from megatron_dypo.refit.plan.refit_plan import Mesh, ServerMesh, make_plan
from megatron_dypo.refit.transports.server_ranks import known_cause, shape_mismatches
from tests.support.architectures import make_arch

STACK = "model.layers.1.mlp.experts.w13_weight"


@pytest.fixture
def planned() -> dict[str, tuple[int, ...]]:
    return make_plan(make_arch("gpt_oss"), Mesh(), [ServerMesh(tensor=1)]).served_shapes(0, 0)


def test_experts_that_triton_kernels_transpose_are_named_with_the_remedy(planned):
    held = {**planned, STACK: (5, 20, 14)}
    assert shape_mismatches(held, planned) == [f"{STACK} has shape (5, 20, 14), the plan has (5, 14, 20)"]
    assert "hold experts transposed: start it with --moe-runner-backend triton" in known_cause(held, planned)


def test_experts_of_another_shape_have_no_known_cause(planned):
    """On a CPU, SGLang pads each rank's part of an expert to a multiple of 64 channels."""
    assert known_cause({**planned, STACK: (5, 128, 20)}, planned) == ""
    without = {name: shape for name, shape in planned.items() if name != STACK}
    assert shape_mismatches(without, planned) == [f"{STACK} is not among its parameters"]
    assert known_cause(without, planned) == ""


def test_shared_experts_that_are_fused_are_named_with_the_remedy():
    planned = make_plan(make_arch("glm4_moe"), Mesh(), [ServerMesh(tensor=1)]).served_shapes(0, 0)
    fused = {name: shape for name, shape in planned.items() if "shared_experts" not in name}
    assert "start it with --disable-shared-experts-fusion" in known_cause(fused, planned)
