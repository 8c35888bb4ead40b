"""Checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing

from megatron_dypo.mcore.chunks import unwrap


def model_state(chunks: Sequence[torch.nn.Module], metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    """Sharded state of the chunks under ``model``, or ``model0``, ``model1``, … for virtual stages."""
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    return {
        name: unwrap(chunk).sharded_state_dict(metadata=metadata) for name, chunk in zip(names, chunks, strict=True)
    }


def load_weights(path: str | Path, chunks: Sequence[torch.nn.Module]) -> None:
    """Load weights."""
    state = dist_checkpointing.load(model_state(chunks), str(path))
    for chunk, weights in zip(chunks, state.values(), strict=True):
        unwrap(chunk).load_state_dict(weights)
