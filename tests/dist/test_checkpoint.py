"""A resumed run equals the uninterrupted one, under the same layout and under another."""

from __future__ import annotations

from tests.support.present import present
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.dist.spawn import run_ranks
from tests.support.dist.training import start
from tests.support.hf_models import make_hf_model

STATE = {"cursor": 17, "policy_version": 2}


def rank_write(path: str, axes: dict, options: dict, root: str) -> tuple[Any, ...]:
    """Return weights after 4 uninterrupted updates, saved after 2, and those of a run resumed from that checkpoint.

    The checkpoint is written during the last two updates, which must not change it.
    """
    from megatron_dypo.config.model import ParallelConfig
    from megatron_dypo.mcore.checkpoints import checkpoint
    from megatron_dypo.mcore.reference import ReferencePolicy
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.parallel.groups import close

    parallel = ParallelConfig(**axes)
    layout = start_megatron(parallel)
    session = start(path, layout, parallel, **options)
    session.train(1, 1)
    reference = ReferencePolicy(session.chunks)
    at_capture = session.weights()
    session.train(2, 2)
    pending = checkpoint.begin_save(
        root,
        2,
        chunks=session.chunks,
        optimizer=session.optimizer,
        layout=layout,
        trainer_state=STATE,
        leader_state=b"queue of replica %d" % layout.dp_rank,
        reference=reference,
    )
    uninterrupted = session.train(3, 4), session.weights()
    folder = pending.finish()
    resumed = _resume(path, layout, parallel, options, folder)
    close(layout)
    return uninterrupted, at_capture, resumed


def rank_read(path: str, axes: dict, options: dict, root: str) -> tuple[Any, ...]:
    """Resume the checkpoint in a run with other axes."""
    from megatron_dypo.config.model import ParallelConfig
    from megatron_dypo.mcore.checkpoints import checkpoint
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.parallel.groups import close

    parallel = ParallelConfig(**axes)
    layout = start_megatron(parallel)
    resumed = _resume(path, layout, parallel, options, present(checkpoint.find_latest(root)))
    close(layout)
    return resumed


def _resume(path: str, layout: Any, parallel: Any, options: dict, folder: Path) -> tuple[Any, ...]:
    from megatron_dypo.mcore.checkpoints import checkpoint
    from megatron_dypo.mcore.reference import ReferencePolicy

    session = start(path, layout, parallel, **options)
    reference = ReferencePolicy(session.chunks)
    restored = checkpoint.load(
        folder, chunks=session.chunks, optimizer=session.optimizer, layout=layout, reference=reference
    )
    result = session.train(3, 4), session.weights()
    with reference.swapped_in():
        in_reference = session.weights()
    return result, in_reference, (restored.step, restored.trainer_state, restored.leader_states)


def joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Join the tensors of all stages."""
    whole = {name: tensor for part in parts for name, tensor in part.items()}
    assert len(whole) == sum(map(len, parts))
    return whole


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


@pytest.mark.parametrize("name", CASES)
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
