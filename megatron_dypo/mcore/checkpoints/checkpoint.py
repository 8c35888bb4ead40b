"""Checkpoints that load at another tensor, pipeline or data parallelism.

One checkpoint is a folder that appears whole or not at all::

    checkpoints/
      latest_checkpointed_iteration.txt     10
      step_000010/
        mcore/                              Megatron dist_checkpointing: weights, optimizer, RNG states
        reference/                          the same for π_ref, if the run refreshes it
        trainer_state.json                  the state of the loop
        leader_00000.bin, …                 the state of each replica's leader (its queues)
        manifest.json                       size and checksums of all these files, written last

It is written as ``step_000010.tmp``, synced and renamed. All ranks share the file system.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # noqa: F401, Megatron's writer needs it without saying so, and hangs where it is missing
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dypo.config.run import CheckpointConfig
from megatron_dypo.mcore.checkpoints import rng
from megatron_dypo.mcore.checkpoints.folder import (
    STATE,
    discard_partial,
    folder_of,
    make_partial,
    partial_of,
    publish,
)
from megatron_dypo.mcore.checkpoints.folder import find_latest as find_latest
from megatron_dypo.mcore.checkpoints.folder import step_of as step_of
from megatron_dypo.mcore.checkpoints.parts import leader_states, load_parts, read_header
from megatron_dypo.mcore.checkpoints.prune import prune
from megatron_dypo.mcore.checkpoints.save_failure import save_failure
from megatron_dypo.mcore.checkpoints.saving import PendingSave, stage
from megatron_dypo.mcore.checkpoints.torch_dist import HF_FOLDER
from megatron_dypo.mcore.checkpoints.verify import HAS_MANIFEST
from megatron_dypo.mcore.checkpoints.weights import fill, model_state, read_weights
from megatron_dypo.mcore.optimizer import PolicyOptimizer
from megatron_dypo.mcore.reference import ReferencePolicy
from megatron_dypo.models.carried import point_to_carried
from megatron_dypo.models.hf.write import copy_beside
from megatron_dypo.parallel.groups import MeshRank

KEEP_ALL = CheckpointConfig(keep=0)
_WEIGHTS, _REFERENCE = "mcore", "reference"


@dataclass(frozen=True, kw_only=True)
class Restored:
    """The contents of a checkpoint besides weights, optimizer and RNG, which are already restored."""

    step: int
    trainer_state: dict[str, Any]
    leader_states: list[bytes]
    """One for each ``dp_rank`` of the run that wrote the checkpoint, however many replicas this run has."""


def begin_save(
    root: str | Path,
    step: int,
    *,
    chunks: Sequence[torch.nn.Module],
    optimizer: PolicyOptimizer,
    layout: MeshRank,
    trainer_state: Mapping[str, object],
    leader_state: bytes = b"",
    reference: ReferencePolicy | None = None,
    hf_path: str | Path | None = None,
    stop_ids: Sequence[int] = (),
    cfg: CheckpointConfig = KEEP_ALL,
) -> PendingSave:
    """Copy the state into host memory, and begin to write ``root/step_<step>`` from it. Collective over the world.

    When this returns, training may go on. The caller must call :meth:`PendingSave.finish` on all ranks.

    Args:
        trainer_state: JSON values. Those of the global leader are stored.
        leader_state: bytes of a replica leader. Those of other ranks are ignored.
        reference: π_ref, if resuming cannot rebuild it from the initial weights.
        hf_path: HF folder whose configuration and tokenizer are copied into the checkpoint, which then converts without
            that folder.
        stop_ids: ids at which the policy stops, for the copied generation_config.json.
        cfg: rules by which older checkpoints stay; the others are removed.

    Raises:
        OSError: the file system is full. Nothing is left of this checkpoint, and older ones are unchanged.
    """
    final = folder_of(root, step)
    parts = (_WEIGHTS,) if reference is None else (_WEIGHTS, _REFERENCE)
    try:
        _on_leader(layout, lambda: make_partial(final, parts))
        requests = _stage_weights(partial_of(final), chunks, optimizer, layout, reference)
        header = _header(step, optimizer, layout) | {"trainer": trainer_state}
        _write_state(partial_of(final), layout, header, leader_state)
        if layout.is_global_leader and hf_path is not None:
            (partial_of(final) / _WEIGHTS / HF_FOLDER).mkdir()
            beside = partial_of(final) / _WEIGHTS / HF_FOLDER
            copy_beside(Path(hf_path), beside, stop_ids=stop_ids)
            point_to_carried(beside, Path(hf_path))
        dist.barrier()
    except (CheckpointException, OSError) as error:
        if layout.is_global_leader:
            discard_partial(final)
        if isinstance(error, CheckpointException):
            raise save_failure(error, final) from error
        raise
    return PendingSave(final, layout, requests, lambda: _publish_and_prune(final, cfg))


def _publish_and_prune(final: Path, cfg: CheckpointConfig) -> None:
    publish(final)
    prune(final, cfg)


def _write_state(partial: Path, layout: MeshRank, header: dict[str, Any], leader_state: bytes) -> None:
    if layout.is_replica_leader:
        (partial / f"leader_{layout.dp_rank:05d}.bin").write_bytes(leader_state)
    if layout.is_global_leader:
        (partial / STATE).write_text(json.dumps(header, indent=1))


def _stage_weights(
    partial: Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: PolicyOptimizer,
    layout: MeshRank,
    reference: ReferencePolicy | None,
) -> list[AsyncRequest]:
    requests = [stage(_whole_state(chunks, optimizer, layout, is_loading=False), partial / _WEIGHTS)]
    if reference is not None:
        with reference.swapped_in():
            requests.append(stage(model_state(chunks), partial / _REFERENCE))
    return requests


def load(
    path: str | Path,
    *,
    chunks: Sequence[torch.nn.Module],
    optimizer: PolicyOptimizer,
    layout: MeshRank,
    reference: ReferencePolicy | None = None,
) -> Restored:
    """Restore a checkpoint, written by any layout, into this run's layout. Collective over the world.

    RNG states are restored only if tensor and pipeline sizes are the same; else they stay as seeded.

    Args:
        reference: filled from the checkpoint if that has one, else unchanged.

    Raises:
        ValueError: the checkpoint is not whole, or is of another kind of optimizer.
    """
    path = Path(path)
    header = read_header(path)
    leaders = leader_states(path, header)
    if header["optimizer"] != optimizer.kind:
        raise ValueError(
            f"{path}: holds the state of a {header['optimizer']}, this run has a {optimizer.kind}: "
            "keep model.dtype, optimizer.distributed and optimizer.algorithm as they were"
        )
    if reference is not None and (path / _REFERENCE).is_dir():
        read_weights(path / _REFERENCE, chunks)
        reference.capture()
    same_axes = (header["tensor"], header["pipeline"]) == (layout.tensor, layout.pipeline)
    state = _whole_state(chunks, optimizer, layout, is_loading=True, with_rng=same_axes)
    loaded = load_parts(state, path / _WEIGHTS)
    fill(chunks, loaded)
    optimizer.load_state(loaded["optimizer"])
    optimizer.num_updates = int(header["num_updates"])
    if same_axes:
        rng.restore(loaded["rng"])
    return Restored(step=int(header["step"]), trainer_state=header["trainer"], leader_states=leaders)


def _whole_state(
    chunks: Sequence[torch.nn.Module],
    optimizer: PolicyOptimizer,
    layout: MeshRank,
    *,
    is_loading: bool,
    with_rng: bool = True,
) -> dict[str, Any]:
    metadata = {
        "dp_cp_group": layout.dp_group,
        # This is the only optimizer format that allows every axis to change.
        "distrib_optim_sharding_type": "fully_reshardable",
        # Only the first replica writes, so only its ranks gather what all replicas hold, and only in host memory.
        "distrib_optim_fully_reshardable_mem_efficient": True,
    }
    state = model_state(chunks, metadata)
    optimizer.fill_state()
    state["optimizer"] = optimizer.megatron.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    if with_rng:
        state["rng"] = rng.sharded_state(layout)
    return state


def _header(step: int, optimizer: PolicyOptimizer, layout: MeshRank) -> dict[str, Any]:
    return {
        "step": step,
        "num_updates": optimizer.num_updates,
        "optimizer": optimizer.kind,
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "data": layout.data,
        HAS_MANIFEST: True,
    }


def _on_leader(layout: MeshRank, action: Callable[[], object]) -> None:
    if layout.is_global_leader:
        action()
    dist.barrier()
