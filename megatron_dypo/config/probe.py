"""The section ``probe`` of the configuration tree: measured variances and biases of the gradients."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dypo.checks import require, require_not_negative


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """The probe: repeated rollouts of the same prompts under fixed weights, and what their gradients say."""

    every: int = 0
    """Optimizer steps between two probes in training. 0: none; ``megatron-dypo probe`` measures checkpoints."""
    prompts: int = 32
    """Prompts to measure: the first draws of the run."""
    repeats: int = 4
    """Groups of ``rollout.group_size`` rollouts of each prompt. Two are enough for a variance; more narrow its
    interval."""
    dimension: int = 4096
    """Numbers that are kept of each trajectory's gradient, a power of two: relative errors are about sqrt(2 /
    dimension). 0: the whole gradient, for small models."""
    target_teacher: str | None = None
    """Teacher whose traces are the target that the others' bias is measured from. ``null``: the mean of all teachers,
    which hides a bias that they share."""
    seed: int = 0
    """Seed of the projection and of the resampling behind the intervals."""

    def __post_init__(self) -> None:
        require_not_negative(self, "every", "seed")
        require(self.prompts >= 3, f"prompts={self.prompts}", "must be at least 3: intervals are over prompts")
        require(self.repeats >= 2, f"repeats={self.repeats}", "must be at least 2: a variance needs two groups")
        size = self.dimension
        require(
            size == 0 or (2 <= size <= 2**24 and size.bit_count() == 1),
            f"dimension={size}",
            "must be 0, or a power of two from 2 to 2^24",
        )
