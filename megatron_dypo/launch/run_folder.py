"""The run folder at the start of a run: made if it does not exist, refused if it cannot be used."""

from __future__ import annotations

import errno
import uuid
from pathlib import Path

_FOLDERS = ("checkpoints", "logs", "samples", "heartbeats", "hf", "tensorboard")
_FILES = ("config.yaml", "metrics.jsonl", "status.json", "run.lock", "wandb_run_id")
_FULL = (errno.ENOSPC, errno.EDQUOT)


def make_run_folder(run_dir: str | Path) -> Path:
    """Make the folder, and check that a run can write to it.

    Raises:
        ValueError: it is a file, is below a file, is read-only, or holds a file where a run has a folder, or the
            reverse.
        OSError: the disk is full.
    """
    folder = Path(run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"probe.{uuid.uuid4().hex}"
        probe.touch(exist_ok=False)
        probe.unlink()
    except FileExistsError as error:
        raise ValueError(f"run.dir={str(run_dir)!r}: a file is there; must be a folder, or free") from error
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in _FULL:
            raise
        raise ValueError(f"run.dir={str(run_dir)!r}: cannot be made or written to: {_reason(error)}") from error
    for name in _FOLDERS:
        if (folder / name).exists() and not (folder / name).is_dir():
            raise ValueError(f"run.dir={str(run_dir)!r}: {name} is not a folder; move it away")
    for name in _FILES:
        if (folder / name).exists() and not (folder / name).is_file():
            raise ValueError(f"run.dir={str(run_dir)!r}: {name} is not a file; move it away")
    return folder


def _reason(error: OSError | ValueError) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
