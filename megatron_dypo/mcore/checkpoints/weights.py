"""The weights of a model in Megatron's dist_checkpointing format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing

from megatron_dypo.mcore.checkpoints.torch_dist import WEIGHTS_FOLDER
from megatron_dypo.mcore.chunks import unwrap


def load_weights(path: str | Path, chunks: Sequence[torch.nn.Module]) -> None:
    """Fill the chunks from a dist_checkpointing folder or a checkpoint of a run. Collective over the world.

    Build the optimizer after this, or call its ``reload_weights``.

    Raises:
        ValueError: no such folder inside ``path``.
    """
    folders = [folder for folder in (Path(path), Path(path) / WEIGHTS_FOLDER) if (folder / "metadata.json").is_file()]
    if not folders:
        raise ValueError(f"{path}: not a Megatron dist_checkpointing folder: metadata.json is missing")
    fill(chunks, dist_checkpointing.load(model_state(chunks), str(folders[0])))


def model_state(chunks: Sequence[torch.nn.Module], metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the sharded state of the chunks under ``model``, or ``model0``, ``model1``, … for virtual stages.

    In the files, tensors have no such prefix and all layers are stacked, so the names are the same for every layout.
    """
    return {
        name: unwrap(chunk).sharded_state_dict(metadata=metadata)
        for name, chunk in zip(_chunk_names(chunks), chunks, strict=True)
    }


def _chunk_names(chunks: Sequence[torch.nn.Module]) -> list[str]:
    return ["model"] if len(chunks) == 1 else [f"model{stage}" for stage in range(len(chunks))]


def fill(chunks: Sequence[torch.nn.Module], state: dict[str, Any]) -> None:
    for name, chunk in zip(_chunk_names(chunks), chunks, strict=True):
        unwrap(chunk).load_state_dict(state[name])
