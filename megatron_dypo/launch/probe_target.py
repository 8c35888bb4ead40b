"""The target of ``megatron-dypo probe``: the config and the weights of a run, and the folder of the results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dypo.checks import require
from megatron_dypo.config.reading.load import load_config
from megatron_dypo.config.tree import Config
from megatron_dypo.mcore.checkpoints.folder import CHECKPOINTS, STATE, find_latest, folder_of, step_of
from megatron_dypo.metrics.probe_files import FOLDER
from megatron_dypo.models.bridged import require_table


@dataclass(frozen=True, kw_only=True)
class ProbeTarget:
    """A run and one of its checkpoints."""

    run_dir: Path
    checkpoint: Path | None
    """None: the weights that the run began with."""

    def config(self, overrides: Sequence[str]) -> Config:
        """Return the run's config for a probe, whose own run folder is ``RUN/probe/step_N``.

        Raises:
            ValueError: the config breaks a rule, an override sets ``run.dir``, or the model has no name table.
        """
        taken = [override for override in overrides if override.partition("=")[0].strip() == "run.dir"]
        require(not taken, f"{taken}", "a probe writes to the folder of its run")
        step = 0 if self.checkpoint is None else step_of(self.checkpoint)
        folder = folder_of(self.run_dir / FOLDER, step)
        # An evaluation would need its data too, and a probe waits for all of its rollouts.
        own = ["eval.sets={}", "rollout.mode=sync", f"run.dir={json.dumps(str(folder))}"]
        config = load_config(self.run_dir / "config.yaml", [*overrides, *own])
        require_table(config.model, "megatron-dypo probe")
        return config


def probe_target(path: Path, *, initial: bool = False) -> ProbeTarget:
    """Return the target that ``path`` names: a run folder, for its newest checkpoint, or ``RUN/checkpoints/step_N``.

    Args:
        initial: measure the weights that the run began with.

    Raises:
        ValueError: it is neither; there is no whole checkpoint; or ``initial`` is combined with a checkpoint.
    """
    if (path / "config.yaml").is_file():
        latest = None if initial else find_latest(path / CHECKPOINTS)
        require(initial or latest is not None, f"{path / CHECKPOINTS}", "has no whole checkpoint; --initial needs none")
        return ProbeTarget(run_dir=path, checkpoint=latest)
    checkpoint = path.absolute()
    run_dir = checkpoint.parent.parent
    is_checkpoint = checkpoint.parent.name == CHECKPOINTS and (run_dir / "config.yaml").is_file() and path.is_dir()
    require(is_checkpoint, f"{path}", "must be a run folder (with config.yaml) or RUN/checkpoints/step_N")
    require(not initial, f"{path} --initial", "name the run folder: a checkpoint has its own weights")
    number = checkpoint.name.removeprefix("step_")
    is_whole = number.isdecimal() and (checkpoint / STATE).is_file()
    require(is_whole, f"{path}", "is no whole checkpoint of a run")
    return ProbeTarget(run_dir=run_dir, checkpoint=checkpoint)
