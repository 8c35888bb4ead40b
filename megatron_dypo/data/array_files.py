"""Arrays in ``.npz`` files, whose parts have checksums."""

from __future__ import annotations

import logging
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from megatron_dypo.fs import new_file

log = logging.getLogger(__name__)


def read_arrays(path: Path, names: Sequence[str]) -> dict[str, npt.NDArray[Any]] | None:
    """Read arrays of an ``.npz`` file; None if there is no file, or (with a warning) if it is damaged."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        log.warning("%s cannot be read (%s): checking again", path, error)
        return None


def write_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write an ``.npz`` file, whole or not at all. Several processes may write the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as file:
        np.savez(file, **cast(Any, arrays))
