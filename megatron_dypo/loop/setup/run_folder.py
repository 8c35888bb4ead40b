"""The run folder at the start of a run: its config, and the checkpoint that it resumes from."""

from __future__ import annotations

import logging
from pathlib import Path

import yaml

from megatron_dypo.config.reading.load import changed_lines, dump_config
from megatron_dypo.config.tree import Config
from megatron_dypo.fs import replace_file
from megatron_dypo.mcore.checkpoints.choose import newest_whole
from megatron_dypo.mcore.checkpoints.folder import CHECKPOINTS, candidates, step_of
from megatron_dypo.mcore.checkpoints.verify import Readers, all_ranks, find_damage
from megatron_dypo.metrics.versions import write_versions

log = logging.getLogger("megatron_dypo")


def prepare_folder(config: Config, readers: Readers) -> Path | None:
    """Make the run folder; return the checkpoint to resume from, if it holds one. Collective over ``readers``.

    Without a checkpoint, config and versions are written at once.

    Raises:
        ValueError: there is a checkpoint, and ``run.resume`` is false or ``run.steps`` is below its step; or there are
            checkpoints, and none is whole.
    """
    folder = Path(config.run.dir)
    existing = readers.gather(candidates(folder / CHECKPOINTS) if readers.is_first else None)[0]
    if existing and not config.run.resume:
        raise ValueError(f"run.resume=false: {existing[0]} exists; choose another run.dir or allow resuming")
    found = newest_whole(existing, config.checkpoint.verify, readers)
    if found and step_of(found) > config.run.steps:
        raise ValueError(f"run.steps={config.run.steps}: is below the {step_of(found)} steps done in {found}")
    if readers.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        written = folder / "config.yaml"
        if not found:
            write_start(config)
        elif written.is_file():
            _warn_of_changes(written, config)
    return found


def _warn_of_changes(written: Path, config: Config) -> None:
    try:
        changes = changed_lines(written.read_text(encoding="utf-8"), dump_config(config))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        log.warning("%s cannot be read, so what changed since is not known: %s", written, error)
        return
    for line in changes:
        log.warning("resuming with another configuration: %s", line)


def write_start(config: Config) -> None:
    """Write config and versions into the run folder. A resume does so only once nothing can refuse it any more."""
    replace_file(Path(config.run.dir) / "config.yaml", dump_config(config))
    write_versions(Path(config.run.dir))


def require_whole(checkpoint: Path | None, config: Config) -> None:
    """Raise ValueError on all ranks if the checkpoint is damaged. Collective over the world."""
    damage = checkpoint and find_damage(checkpoint, config.checkpoint.verify, all_ranks(), show_progress=True)
    if damage:
        raise ValueError(f"{checkpoint}/{damage}")
