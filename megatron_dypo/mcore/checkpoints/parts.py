"""The parts of a checkpoint on their way back: header, leaders' states, and Megatron's tensors."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingException, maybe_load_config
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dypo.json_text import parse_json
from megatron_dypo.mcore.checkpoints.folder import STATE
from megatron_dypo.mcore.compat import restricted_reading
from megatron_dypo.mcore.compat.restricted_pickle import load_metadata
from megatron_dypo.models.hf.json_file import shown

_RESTORE = "restore it, or move the folder away to go on from an older checkpoint"


def read_header(path: Path) -> dict[str, Any]:
    """Read ``trainer_state.json``. Raises ValueError if it is missing or damaged."""
    if not (path / STATE).is_file():
        raise ValueError(f"{path}: not a checkpoint: {STATE} is missing")
    return _read_json(path / STATE)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {str(error)[:200]}: {_RESTORE}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: is no mapping: {_RESTORE}")
    return found


def _require_config(folder: Path) -> None:
    """Require the file by which Megatron chooses how to read a checkpoint."""
    path = folder / CONFIG_FNAME
    _read_json(path)
    try:
        config = maybe_load_config(str(folder))
    except TypeError as error:
        raise ValueError(f"{path}: {error}: {_RESTORE}") from error
    for name, value in vars(config).items():
        if not isinstance(value, str | int):
            raise ValueError(f"{path}: {name}={shown(value)}: must be a text or a number: {_RESTORE}")


def leader_states(path: Path, header: dict[str, Any]) -> list[bytes]:
    """Read the state of each replica's leader. Raises ValueError if a file is missing."""
    files = sorted(path.glob("leader_*.bin"))
    expected = header.get("data", len(files))
    if len(files) != expected:
        raise ValueError(f"{path}: has {len(files)} files leader_*.bin of {expected}: {_RESTORE}")
    return [file.read_bytes() for file in files]


def load_parts(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Read Megatron's part of a checkpoint, which is in ``folder``, into ``state``. Collective over the world.

    Raises:
        ValueError: a file is damaged or missing, or a pickle in it would run code. None is run.
    """
    _require_config(folder)
    metadata = load_metadata(folder / ".metadata")
    try:
        return restricted_reading.load(state, folder, metadata)
    except (
        CheckpointException,
        CheckpointingException,
        pickle.UnpicklingError,
        EOFError,
        json.JSONDecodeError,
    ) as error:
        # torch gives the reasons of all ranks only to the first one.
        failures = error.failures.values() if isinstance(error, CheckpointException) else [(error, None)]
        reason = "".join(f" ({str(why)[:200] or type(why).__name__})" for why, _ in list(failures)[:1])
        raise ValueError(f"{folder}: cannot be read, a file of it is damaged or missing{reason}: {_RESTORE}") from error
