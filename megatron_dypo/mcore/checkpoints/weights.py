"""The weights of a model in Megatron's dist_checkpointing format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_dypo.mcore.checkpoints.parts import load_parts
from megatron_dypo.mcore.checkpoints.torch_dist import WEIGHTS_FOLDER
from megatron_dypo.mcore.checkpoints.verify import all_ranks, find_damage_of_weights
from megatron_dypo.mcore.chunks import unwrap
from megatron_dypo.mcore.compat.restricted_pickle import require_plain_state, te_may_unpickle
from megatron_dypo.mcore.param_gather import finish_gather


def load_weights(path: str | Path, chunks: Sequence[torch.nn.Module]) -> None:
    """Fill the chunks from a dist_checkpointing folder or a checkpoint of a run. Collective over the world.

    Build the optimizer after this, or call its ``reload_weights``.

    Raises:
        ValueError: no such folder inside ``path``, a file of it is damaged, or a pickle in it would run code.
    """
    folders = [folder for folder in (Path(path), Path(path) / WEIGHTS_FOLDER) if (folder / "metadata.json").is_file()]
    if not folders:
        raise ValueError(f"{path}: not a Megatron dist_checkpointing folder: metadata.json is missing")
    damage = find_damage_of_weights(folders[0], all_ranks())
    if damage is not None:
        raise ValueError(damage)
    read_weights(folders[0], chunks)


def read_weights(folder: Path, chunks: Sequence[torch.nn.Module]) -> None:
    """Fill the chunks from a dist_checkpointing folder that is not verified here. Collective over the world.

    Raises:
        ValueError: a file is damaged or missing, or a pickle in it would run code.
    """
    fill(chunks, load_parts(model_state(chunks), folder))


def model_state(chunks: Sequence[torch.nn.Module], metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the sharded state of the chunks under ``model``, or ``model0``, ``model1``, … for virtual stages.

    In the files, tensors have no such prefix and all layers are stacked, so the names are the same for every layout.
    """
    finish_gather(chunks)
    return {
        name: unwrap(chunk).sharded_state_dict(metadata=metadata)
        for name, chunk in zip(_chunk_names(chunks), chunks, strict=True)
    }


def _chunk_names(chunks: Sequence[torch.nn.Module]) -> list[str]:
    return ["model"] if len(chunks) == 1 else [f"model{stage}" for stage in range(len(chunks))]


def fill(chunks: Sequence[torch.nn.Module], state: dict[str, Any]) -> None:
    """Put a loaded state into the chunks.

    Raises:
        ValueError: a module's extra state would run code when the module unpickles it.
    """
    for name, chunk in zip(_chunk_names(chunks), chunks, strict=True):
        for key, value in state[name].items():
            if key.rpartition(".")[2].startswith("_extra_state"):
                require_plain_state(key, value)
        with te_may_unpickle():
            unwrap(chunk).load_state_dict(state[name])
