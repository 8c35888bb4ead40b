"""The verifier's part of the configuration tree; see :mod:`megatron_dypo.config.tree`."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dypo.config.rules import require, require_positive


@dataclass(frozen=True, kw_only=True)
class GradingConfig:
    """How answers are verified."""

    verifier: str = "math"
    """``math``, ``exact``, ``choice``, or an import path ``pkg.module:function`` of ``(response, answer) -> bool | float | dict``."""
    workers: int = 2
    """Verifier processes on each data-parallel rank."""
    deadline_s: float = 10.0
    """A verification that takes longer is stopped and counted as an error."""
    truncated_is_wrong: bool = True
    """A rollout that hit the length limit is incorrect whatever it says."""

    def __post_init__(self) -> None:
        require_positive(self, "workers", "deadline_s")
        known = ("math", "exact", "choice")
        require(
            self.verifier in known or ":" in self.verifier,
            f"verifier={self.verifier!r}",
            f"must be one of {', '.join(known)} or an import path pkg.module:function",
        )
