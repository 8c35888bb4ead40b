"""Ranks that train, save and resume, for tests that compare resumed runs with uninterrupted ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.support.dist.training import start
from tests.support.present import present

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
