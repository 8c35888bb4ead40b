"""The files of the initial weights, which are π_ref of the whole run if it is frozen, as a resume compares them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megatron_dypo.config.model import ModelConfig
from megatron_dypo.metrics.progress import progress
from megatron_dypo.models.hf.files import files_of_weights
from megatron_dypo.parallel.collectives import gather_world

_BLOCK_BYTES = 16 * 2**20


def hash_reference(model: ModelConfig) -> dict[str, str]:
    """Return file → SHA-256 for the files of the initial weights. Collective over the world: each rank reads its share.

    Raises:
        ValueError: a file of ``model.hf_path`` is missing or damaged.
        OSError: a file cannot be read.
    """
    folder = Path(model.mcore_path or model.hf_path)
    files = _files(folder) if model.mcore_path is not None else files_of_weights(folder)
    mine = files[dist.get_rank() :: dist.get_world_size()]
    mib = sum(path.stat().st_size for path in mine) // 2**20
    with progress(mib, "checksums of the reference", "MiB", enabled=dist.get_rank() == 0) as bar:
        hashes = {str(path.relative_to(folder)): _sha256(path, bar.update) for path in mine}
    found = {name: digest for part in gather_world(hashes) for name, digest in part.items()}
    return dict(sorted(found.items()))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path, read: Callable[[int], object]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            read(len(block) // 2**20)
    return digest.hexdigest()
