"""The policy as the loop sees it: log-probs, updates and files. :mod:`megatron_dypo.loop.megatron_policy` has the real
one.

Samples and log-probs are on the leaders of replicas; the other ranks pass () and get []. Every method is called by all
ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_dypo.types import Floats, Sample


@dataclass(frozen=True, kw_only=True, eq=False)
class UpdateReport:
    """The result of one update, the same on every rank but for ``flops`` and ``samples``."""

    is_applied: bool
    """False: the gradients were not finite, and the weights stay as they were."""
    sums: dict[str, float]
    """The sums of the loss over all ranks, by name."""
    metrics: dict[str, float]
    """Metrics of the optimizer and of packing."""
    flops: float
    """Work of this replica (see ``models.flops``)."""
    samples: Sequence[Sample]
    """Those that this replica learned from, on all of its ranks."""


class Policy(Protocol):
    """A policy that learns, its optimizer and its reference."""

    @property
    def keeps_reference(self) -> bool:
        """Tell whether π_ref has weights of its own here; else π_old stands for it, or nothing reads it."""

    def logprobs(self, samples: Sequence[Sample]) -> list[Floats]:
        """Return log π of each sample's response tokens, [R] each, under the weights of now."""

    def reference_logprobs(self, samples: Sequence[Sample]) -> list[Floats]:
        """Return the same under the reference's weights; only where ``keeps_reference``."""

    def replica_logprobs(self, samples: Sequence[Sample]) -> list[Floats]:
        """Return the same for samples that every rank of the replica has already, such as an update's."""

    def update(self, weighted: Sequence[Sample]) -> UpdateReport:
        """Make one optimizer step from the samples of all replicas, which have their token weights."""

    def refresh_reference(self) -> None:
        """Make the weights of now the reference; only where ``keeps_reference``."""

    def bad_weight(self) -> str | None:
        """Name the first parameter that holds a value that is not finite, on any rank; None if all are."""

    def bad_gradient(self) -> str | None:
        """Name the first parameter whose gradient of the last update is not finite, on any rank; None if all are."""

    def save(
        self,
        root: Path,
        step: int,
        *,
        trainer_state: Mapping[str, object],
        leader_state: bytes,
        stop_ids: Sequence[int],
        keep: int,
    ) -> Path:
        """Write a checkpoint of step ``step`` (see ``mcore.checkpoints.checkpoint.save``); return its folder."""

    def export(self, out_dir: Path, *, stop_ids: Sequence[int]) -> None:
        """Write the weights as a Hugging Face model folder, whose generation ends at ``stop_ids``."""
