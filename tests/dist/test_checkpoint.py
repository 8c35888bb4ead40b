"""A resumed run equals the uninterrupted one, under the same layout and under another."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from tests.support.dist.resumed import STATE, joined, rank_read, rank_write
from tests.support.dist.spawn import run_ranks
from tests.support.hf_models import make_hf_model
from tests.support.slow import slow_unless

CASES = {
    "plain": ("llama_tied", {"tensor": 2, "pipeline": 2, "first_stage_layers": 3}, {}, 2, {}),
    "distributed": (
        "qwen2",
        {"tensor": 2},
        {"distributed": True},
        2,
        {"pipeline": 2, "virtual_pipeline": 2},
    ),
    "experts": (
        "qwen3_moe",
        {"pipeline": 2, "expert": 2, "last_stage_layers": 3},
        {"distributed": True},
        2,
        {"tensor": 2, "sequence": True, "expert": 2},
    ),
    "split experts": (
        "qwen3_moe",
        {"expert": 2, "expert_tensor": 2},
        {"distributed": True},
        2,
        {"tensor": 2, "sequence": True, "expert_tensor": 2},
    ),
    "context": (
        "qwen3",
        {"tensor": 2, "context": 2},
        {"distributed": True},
        4,
        {"context": 2, "pipeline": 2, "last_stage_layers": 1},
    ),
}


@pytest.mark.parametrize("name", slow_unless(lambda name: name in ("distributed", "split experts"), CASES))
def test_resumed_run_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    kind, axes, options, other_world, other_axes = CASES[name]
    path, root = str(make_hf_model(kind, tmp_path / "hf")), str(tmp_path / "checkpoints")
    written = run_ranks(4, rank_write, path, axes, options, root)
    (steps, _), _, (_, _, restored) = written[0]
    weights = joined([uninterrupted[1] for uninterrupted, _, _ in written])
    reference = joined([at_capture for _, at_capture, _ in written])

    same = joined([resumed[0][1] for _, _, resumed in written])
    for tensor_name, tensor in weights.items():
        np.testing.assert_array_equal(same[tensor_name], tensor, err_msg=tensor_name)
    replicas = 4 // math.prod(axes.get(axis, 1) for axis in ("tensor", "pipeline", "context"))
    assert restored == (2, STATE, [b"queue of replica %d" % i for i in range(replicas)])
    assert [resumed[0][0] for _, _, resumed in written] == [steps] * 4

    read = run_ranks(other_world, rank_read, path, other_axes, options, root)
    other = joined([result[1] for result, _, _ in read])
    other_reference = joined([in_reference for _, in_reference, _ in read])
    for tensor_name, tensor in weights.items():
        np.testing.assert_allclose(other[tensor_name], tensor, atol=2e-6, rtol=0, err_msg=tensor_name)
        np.testing.assert_array_equal(other_reference[tensor_name], reference[tensor_name], err_msg=tensor_name)
    np.testing.assert_allclose(read[0][0][0], steps, rtol=1e-5)
