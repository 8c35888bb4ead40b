"""Folders at a known path of a shared node that another user has made, or could have filled."""

from __future__ import annotations

import os
from pathlib import Path

from tests.slurm_host.host import require

STRANGE_FOLDERS = ("a link", "writable by all", "writable by the group", "of another user")
_NOBODY = 65534


def make_strange_folder(path: Path, kind: str) -> None:
    """Make one of the :data:`STRANGE_FOLDERS` at ``path``."""
    if kind == "a link":
        target = path.with_name("target")
        target.mkdir(mode=0o700)
        path.symlink_to(target)
        return
    path.mkdir()
    path.chmod({"writable by all": 0o777, "writable by the group": 0o770}.get(kind, 0o700))
    if kind == "of another user":
        require(os.getuid() == 0, "needs root, to give a folder to another user")
        os.chown(path, _NOBODY, _NOBODY)
