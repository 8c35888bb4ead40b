"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, which takes the name ``path`` when the block ends well and vanishes when it raises.

    Args:
        replace: an HF folder that is at ``path`` gives way to it then.

    Raises:
        ValueError: ``path`` is there already and is not an empty folder (with ``replace``: nor an HF folder).
    """
    if not (replace and (path / "config.json").is_file()):
        check_vacant(path)
    partial = start_folder(path)
    try:
        yield partial
        commit_folder(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_vacant(path: Path) -> None:
    """Raise ValueError unless ``path`` is free, or an empty folder."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path}: is there already and is not an empty folder; choose another or remove it")


def partial_path(path: Path) -> Path:
    """Where ``path`` is filled before it gets its name: beside it, so that the rename stays on one file system."""
    return path.absolute().with_name(f".{path.name}.partial")


def start_folder(path: Path) -> Path:
    """Create the empty folder that will become ``path``; what an interrupted attempt left is removed.

    Raises:
        ValueError: no folder can be created there.
    """
    partial = partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{path}: cannot be created: {error.strerror}") from error
    return partial


def commit_folder(partial: Path, path: Path) -> None:
    """Give a filled folder its name, in the place of one that has it already; durable once this returns."""
    _sync(partial)
    if path.exists():
        # A folder cannot be renamed onto one that is not empty, so the old one steps aside first.
        old = path.absolute().with_name(f".{path.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        partial.rename(path)
        shutil.rmtree(old)
    else:
        partial.rename(path)
    _sync(path.absolute().parent)


@contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file and flush it to the disk before the block is left."""
    with path.open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
