"""The progress of a run: the state that its steps change, besides weights, queues and books."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_dypo.batching.rollout_batch import RolloutBatch
from megatron_dypo.objective.auto_alpha import GradientMoments


@dataclass(kw_only=True)
class Progress:
    """The progress of a run; the same on every rank, except for the groups of ``batch``."""

    step: int = 0
    """Optimizer steps done; also the version of the weights."""
    batches: int = 0
    """Rollout batches begun."""
    batch: RolloutBatch = field(default_factory=RolloutBatch)
    """The current rollout batch. If it is used up, the next step collects a new one."""
    bad_steps: int = 0
    """Updates in a row that were skipped because their gradients were not finite."""
    moments: GradientMoments | None = None
    """Running estimates of the probe, for ``objective.alpha: auto``; None before the first, and with any other α."""
    rollbacks: int = 0
    """Times that weights and optimizer went back to a checkpoint in this start of the run."""
    last_problem: str = ""
    """Why the last skipped update was skipped."""

    def count_update(self, problem: str | None) -> None:
        """Count an update; ``problem`` says why it was skipped, None if it was not."""
        self.step += 1
        self.bad_steps = 0 if problem is None else self.bad_steps + 1
        self.last_problem = problem or self.last_problem
