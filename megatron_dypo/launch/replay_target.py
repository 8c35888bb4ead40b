"""The target of ``megatron-dypo replay``: the dump of a bad step, and the config that runs it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dypo.checks import require
from megatron_dypo.config.reading.load import load_config
from megatron_dypo.config.tree import Config
from megatron_dypo.loop.bad_steps.dump import CONFIG, Dump, find_dump, read_dump

OUTPUT = "replay"
"""Folder of a dump for the log and the report of a replay."""
_WAS_REMOVED = (
    "the dump names this checkpoint of step {step}, which was removed or moved since. checkpoint.keep removes all but "
    "the newest ones; checkpoint.keep_every keeps more. Name the nearest one that is left (`megatron-dypo checkpoints "
    "RUN` lists them), or an HF folder, with --weights: the replay then shows what is not finite under those weights, "
    "and a value may be finite that was not in the run"
)


@dataclass(frozen=True, kw_only=True)
class ReplayTarget:
    """One replica's dump, and the weights for its replay."""

    folder: Path
    dump: Dump
    weights: Path

    @property
    def is_checkpoint(self) -> bool:
        """Whether the weights are a checkpoint of a run, not an HF folder."""
        return not (self.weights / "config.json").is_file()

    def config(self, overrides: Sequence[str]) -> Config:
        """Return the config for the replay: one replica, and a run folder of its own in the dump.

        Raises:
            ValueError: the config breaks a rule, or an override sets ``run.dir``.
        """
        taken = [override for override in overrides if override.partition("=")[0].strip() == "run.dir"]
        require(not taken, f"{taken}", "a replay writes to the folder of its dump")
        own = ["eval.sets={}", f"run.dir={json.dumps(str(self.folder / OUTPUT))}"]
        if not self.is_checkpoint:
            own.append(f"model.hf_path={json.dumps(str(self.weights))}")
        return load_config(self.folder / CONFIG, ["parallel.num_processes=null", *overrides, *own])


def replay_target(path: Path, *, weights: Path | None = None) -> ReplayTarget:
    """Return the target that ``path`` names: ``RUN/bad_steps/step_N``, or the folder of a replica in it.

    Args:
        weights: checkpoint or HF folder, in place of the one that the dump names.

    Raises:
        ValueError: there is no dump, or no such weights.
    """
    folder = find_dump(path)
    dump = read_dump(folder)
    source = weights or Path(dump.weights)
    if weights is None and dump.weights_step and not source.is_dir():
        raise ValueError(f"{source}: {_WAS_REMOVED.format(step=dump.weights_step)}")
    require(source.is_dir(), f"{source}", "is no folder: name a checkpoint or an HF folder with --weights")
    return ReplayTarget(folder=folder.absolute(), dump=dump, weights=source.absolute())
