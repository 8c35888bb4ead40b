"""The files of the initial weights, which are π_ref of the whole run if it is frozen, as a resume compares them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megatron_dypo.config.model import ModelConfig
from megatron_dypo.fs import hash_file
from megatron_dypo.metrics.progress import progress
from megatron_dypo.models.hf.files import files_of_weights
from megatron_dypo.parallel.collectives import gather_world


def hash_reference(model: ModelConfig) -> dict[str, str]:
    """Return file → SHA-256 for the files of the initial weights. Collective over the world: each rank reads its share.

    Raises:
        ValueError: a file of ``model.hf_path`` is missing or damaged.
        OSError: a file cannot be read.
    """
    folder = Path(model.mcore_path or model.hf_path)
    files = _files(folder) if model.mcore_path is not None else files_of_weights(folder)
    mine = files[dist.get_rank() :: dist.get_world_size()]
    total = sum(path.stat().st_size for path in mine)
    with progress(total, "checksums of the reference", "bytes", enabled=dist.get_rank() == 0) as bar:
        hashes = {str(path.relative_to(folder)): _hash(path, bar.update) for path in mine}
    found = {name: digest for part in gather_world(hashes) for name, digest in part.items()}
    return dict(sorted(found.items()))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _hash(path: Path, update: Callable[[int], object]) -> str:
    with path.open("rb") as file:
        return hash_file(file, update)
