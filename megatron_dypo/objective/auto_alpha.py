"""α from measured variances, with ``objective.alpha: auto``. An experiment of this project, not of the paper. Pure.

The variance of α·g_GRPO + (1−α)·g_GAL is least at α = (V_GAL − C) / (V_GRPO + V_GAL − 2C), where V are the variances of
the two gradients of one prompt and C is their covariance, as the probe estimates them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from megatron_dypo.config.objective import AutoAlphaConfig


@dataclass(frozen=True, kw_only=True)
class GradientMoments:
    """Running estimates of one prompt's gradients; all three have the same unit."""

    grpo: float
    """V_GRPO."""
    gal: float
    """V_GAL."""
    covariance: float
    """C."""

    @staticmethod
    def from_json(data: Mapping[str, float] | None) -> GradientMoments | None:
        """Read what :meth:`as_json` wrote; None: nothing was measured."""
        return None if data is None else GradientMoments(**data)

    def as_json(self) -> dict[str, float]:
        return asdict(self)

    def mixed_into(self, before: GradientMoments | None, smoothing: float) -> GradientMoments:
        """Return ``smoothing`` · before + (1 − smoothing) · these; these alone, if there is nothing before."""
        if before is None:
            return self
        old, new = asdict(before), asdict(self)
        return GradientMoments(**{name: smoothing * old[name] + (1 - smoothing) * new[name] for name in new})

    def alpha(self, cfg: AutoAlphaConfig) -> float:
        """Return the α of the least variance within the bounds; the middle of the bounds, if α changes nothing."""
        curvature = self.grpo + self.gal - 2 * self.covariance
        if curvature <= 0:  # a variance cannot be, an estimate can
            return (cfg.low + cfg.high) / 2
        return min(max((self.gal - self.covariance) / curvature, cfg.low), cfg.high)
