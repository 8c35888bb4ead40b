"""Small checkpoints of real ranks, for tests that damage copies of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.dist.training import start
from tests.support.present import present


def rank_save(path: str, root: str, steps: tuple[int, ...]) -> None:
    """Train a model on two replicas, and save it, with a reference and a state for each leader, at these steps."""
    from megatron_dypo.config.model import ParallelConfig
    from megatron_dypo.mcore.checkpoints import checkpoint
    from megatron_dypo.mcore.reference import ReferencePolicy
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.parallel.groups import close

    parallel = ParallelConfig()
    layout = start_megatron(parallel)
    session = start(path, layout, parallel, distributed=True)
    reference = ReferencePolicy(session.chunks)
    for step in steps:
        session.train(step, step)
        checkpoint.begin_save(
            root,
            step,
            chunks=session.chunks,
            optimizer=session.optimizer,
            layout=layout,
            trainer_state={"cursor": step},
            leader_state=b"queue of replica %d" % layout.dp_rank,
            reference=reference,
            hf_path=Path(path),
        ).finish()
    close(layout)


def rank_resume(path: str, roots: list[str], weights: str) -> tuple[list[tuple[int, dict[str, Any], list[bytes]]], str]:
    """Return the step and the states that each folder of checkpoints brings back, and the error of initial ``weights``
    that are read after that."""
    from megatron_dypo.config.model import ParallelConfig
    from megatron_dypo.mcore.checkpoints import checkpoint
    from megatron_dypo.mcore.checkpoints.choose import newest_whole
    from megatron_dypo.mcore.checkpoints.folder import candidates
    from megatron_dypo.mcore.checkpoints.verify import Readers
    from megatron_dypo.mcore.checkpoints.weights import load_weights
    from megatron_dypo.mcore.reference import ReferencePolicy
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.parallel.collectives import gather_world
    from megatron_dypo.parallel.groups import close

    parallel = ParallelConfig()
    layout = start_megatron(parallel)
    session = start(path, layout, parallel, distributed=True)
    reference = ReferencePolicy(session.chunks)
    readers = Readers(rank=layout.rank, count=layout.world_size, gather=gather_world)
    found = []
    for root in roots:
        chosen = present(newest_whole(candidates(Path(root)), "full", readers))
        restored = checkpoint.load(
            chosen, chunks=session.chunks, optimizer=session.optimizer, layout=layout, reference=reference
        )
        found.append((restored.step, restored.trainer_state, restored.leader_states))
    error = ""
    try:
        load_weights(weights, session.chunks)
    except ValueError as refused:
        error = str(refused)
    close(layout)
    return found, error
