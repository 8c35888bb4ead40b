"""The evaluated model: an HF folder, a run or one of its checkpoints, or a model's name at an endpoint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from megatron_dypo.mcore.checkpoints.export_run import EXPORTS, export_run, whole_checkpoints
from megatron_dypo.mcore.checkpoints.folder import CHECKPOINTS

_SAMPLED_BYTES = 2**20


def hf_folder_of(model: str) -> Path:
    """Return the HF folder of a model.

    Args:
        model: an HF folder; a run folder, for its newest whole checkpoint; or ``RUN/checkpoints/step_000100``. A
            checkpoint is exported to ``RUN/exports/step_000100``, unless that folder exists.

    Raises:
        ValueError: ``model`` is none of these.
    """
    path = Path(model)
    if (path / "config.json").is_file():
        return path
    if (path / CHECKPOINTS).is_dir():
        newest = max(whole_checkpoints(path / CHECKPOINTS), default=0)
        return _export_of(path, newest) or export_run(path, keep=True)
    name = path.name.removeprefix("step_")
    if path.is_dir() and path.resolve().parent.name == CHECKPOINTS and name.isdecimal():
        run_dir = path.resolve().parent.parent
        return _export_of(run_dir, int(name)) or export_run(run_dir, step=int(name))
    raise ValueError(
        f"{model}: no config.json there, no folder {CHECKPOINTS}, and no checkpoint of a run; a model is an HF folder, "
        "a run folder or RUN/checkpoints/step_N, or with --url and --api chat or completions a name at the endpoint"
    )


def _export_of(run_dir: Path, step: int) -> Path | None:
    """Return the HF folder of a step if it was exported before."""
    target = run_dir / EXPORTS / f"step_{step:06d}"
    return target if (target / "config.json").is_file() else None


def weights_identity(folder: Path) -> str:
    """Return a hash that identifies the weights of an HF folder: of config.json, and of name, size, first and last MiB
    of each safetensors file."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(json.dumps([file.name, size]).encode())
        with file.open("rb") as content:
            digest.update(content.read(_SAMPLED_BYTES))
            content.seek(max(0, size - _SAMPLED_BYTES))
            digest.update(content.read(_SAMPLED_BYTES))
    return digest.hexdigest()
