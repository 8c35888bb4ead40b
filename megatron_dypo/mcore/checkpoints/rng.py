"""RNG states of this rank as tensors, so that this package adds no pickles to a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_dypo.parallel import device
from megatron_dypo.parallel.groups import MeshRank


def sharded_state(layout: MeshRank) -> dict[str, ShardedTensor]:
    """Return the states of the CPU, the device and Megatron's tracker, one of each for every (pipeline, tensor) rank.

    Data- and context-parallel ranks hold the same states, which are stored once.
    """
    states = {"cpu": torch.get_rng_state(), **get_cuda_rng_tracker().get_states()}
    if device.on_gpu():
        states["device"] = device.get_rng_state()
    return {
        name: ShardedTensor.from_rank_offsets(
            f"rng.{name}",
            state,
            (0, layout.pp_rank, layout.pipeline),
            (1, layout.tp_rank, layout.tensor),
            prepend_axis_num=2,
            replica_id=layout.dp_rank * layout.context + layout.cp_rank,
        )
        for name, state in states.items()
    }


def restore(states: dict[str, Any]) -> None:
    """Restore the states of :func:`sharded_state`."""
    torch.set_rng_state(states["cpu"])
    if device.on_gpu():
        device.set_rng_state(states["device"])
    get_cuda_rng_tracker().set_states({name: s for name, s in states.items() if name not in ("cpu", "device")})
