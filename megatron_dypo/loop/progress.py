"""How far a run is: the state that its steps change, beside weights, queues and books."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_dypo.batching.rollout_batch import RolloutBatch


@dataclass(kw_only=True)
class Progress:
    """How far a run is; the same on every rank, but for the groups of ``batch``."""

    step: int = 0
    """Optimizer steps done; also the version of the weights."""
    batches: int = 0
    """Rollout batches begun."""
    batch: RolloutBatch = field(default_factory=RolloutBatch)
    """The rollout batch that updates are being made from; used up: the next step collects one."""
    bad_steps: int = 0
    """Updates in a row that were skipped because their gradients were not finite."""
    last_problem: str = ""
    """The reason of the last update that was skipped."""

    def count_update(self, problem: str | None) -> None:
        """Count an update; ``problem`` is the reason where it was skipped."""
        self.step += 1
        self.bad_steps = 0 if problem is None else self.bad_steps + 1
        self.last_problem = problem or self.last_problem
