"""Who may read the files that a command makes from a run: those who may read the files of the run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from megatron_dypo.fs import set_access

_CONFIG, _CHECKPOINTS = "config.yaml", "checkpoints"


def set_access_of_runs(run_dirs: Iterable[Path]) -> None:
    """Let only this user read new files, unless all of these runs share theirs (``run.shared_files``)."""
    set_access(shared=all(shares_files(run_dir) for run_dir in run_dirs))


def set_access_of_checkpoint(path: Path) -> None:
    """Do the same for the run of a checkpoint, or of a folder in one. Without a run, the umask decides."""
    run_dirs = [parent.parent for parent in path.absolute().parents if parent.name == _CHECKPOINTS]
    if run_dirs:
        set_access_of_runs(run_dirs[:1])


def shares_files(run_dir: Path) -> bool:
    """Return ``run.shared_files`` of a run's config; False if the config cannot be read or lacks the key."""
    try:
        tree = yaml.safe_load((run_dir / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    run = tree.get("run") if isinstance(tree, Mapping) else None
    return isinstance(run, Mapping) and run.get("shared_files") is True
