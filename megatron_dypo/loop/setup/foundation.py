"""The parts of a run that are there first, and that data and servers are opened with."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from megatron_dypo.config.tree import Config
from megatron_dypo.loop.books.tally import Tally
from megatron_dypo.loop.megatron_policy import MegatronPolicy
from megatron_dypo.loop.progress import Progress
from megatron_dypo.loop.ranks import MeshRanks
from megatron_dypo.mcore.checkpoints.checkpoint import Restored
from megatron_dypo.metrics.writer import Timings
from megatron_dypo.objective.recipes.base import Objective


@dataclass(frozen=True, kw_only=True)
class Foundation:
    """The ranks and the policy of a run, and how far it is."""

    config: Config
    ranks: MeshRanks
    objective: Objective
    policy: MegatronPolicy
    progress: Progress
    restored: Restored | None
    """The checkpoint that the run goes on from."""
    with_servers: bool
    """Whether a step that is left, or an evaluation, asks a server."""
    timings: Timings
    tally: Tally
    stack: contextlib.ExitStack
    """Closes what is opened, in reverse order."""

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.config.run.dir)
