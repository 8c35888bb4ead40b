"""The parts of a run that are built first; opening data and servers needs them."""

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
    """The ranks, the policy and the progress of a run."""

    config: Config
    ranks: MeshRanks
    objective: Objective
    policy: MegatronPolicy
    progress: Progress
    restored: Restored | None
    """The checkpoint from which the run resumes."""
    with_servers: bool
    """Whether a remaining step or an evaluation asks a server."""
    timings: Timings
    tally: Tally
    stack: contextlib.ExitStack
    """Closes the parts of the run in reverse order."""
    reference_files: dict[str, str] | None = None
    """File → SHA-256 of a frozen π_ref; None if the run has none."""

    @property
    def run_dir(self) -> Path:
        """Return the run folder."""
        return Path(self.config.run.dir)
