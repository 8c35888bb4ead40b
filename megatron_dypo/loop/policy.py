"""The policy as the loop sees it: log-probs, updates and files. :mod:`megatron_dypo.loop.megatron_policy` has the real
one.

Only the leaders of replicas hold samples and log-probs; the other ranks pass () and get []. All ranks call every
method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_dypo.config.run import CheckpointConfig
from megatron_dypo.types import Floats, Routes, Sample


@dataclass(frozen=True, kw_only=True, eq=False)
class UpdateReport:
    """The result of one update; only ``flops``, ``model_flops``, ``samples`` and ``bins`` differ between ranks."""

    is_applied: bool
    """False: the gradients were not finite, and the weights stay as they were."""
    sums: dict[str, float]
    """The sums of the loss over all ranks, by name."""
    metrics: dict[str, float]
    """Metrics of the optimizer and of packing."""
    flops: float
    """Work of this replica (see ``models.flops``)."""
    model_flops: float = 0.0
    """FLOPs of this replica without recomputation."""
    samples: Sequence[Sample]
    """The samples that this replica learned from, on all of its ranks."""
    bins: Sequence[Sequence[int]] = ()
    """The samples of each microbatch, by their index in ``samples``."""
    busy_s: Sequence[float] = ()
    """Seconds of forward and backward, by rank, until the wait for other replicas."""
    work: Sequence[float] = ()
    """FLOPs of the replica of each rank."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PolicyScores:
    """The scores of N samples; on ranks that are no leaders N is 0."""

    score_Nd: Floats
    """Projections of ∇_θ Σ_t log π(a_t)."""
    logp_N: npt.NDArray[np.float64]
    """Σ_t log π(a_t), from the forward passes of the scores."""


class Policy(Protocol):
    """A policy that learns, its optimizer and its reference."""

    @property
    def keeps_reference(self) -> bool:
        """Return whether π_ref has its own weights here; else π_ref is π_old, or nothing reads it."""

    def logprobs(self, samples: Sequence[Sample]) -> list[Floats]:
        """Return log π of each sample's response tokens, [R] each, under the current weights."""

    def entropies(self, samples: Sequence[Sample]) -> list[Floats]:
        """Return the entropy of π where each response token is sampled, [R] each, under the weights of now."""

    def reference_logprobs(self, samples: Sequence[Sample]) -> list[Floats]:
        """Return the same under the reference's weights. Call it only if ``keeps_reference``."""

    def replica_logprobs(self, samples: Sequence[Sample]) -> list[Floats]:
        """Return the same for samples that every rank of the replica already holds, such as those of an update."""

    def logprobs_and_routes(self, samples: Sequence[Sample]) -> tuple[list[Floats], list[Routes]]:
        """Return :meth:`own_choice_logprobs`, and the experts that the routers chose: [L, layers, k] of each sample."""

    def own_choice_logprobs(self, samples: Sequence[Sample]) -> list[Floats]:
        """Return the log-probs that the policy has when its routers choose the experts, whatever routes the samples
        bring."""

    def scores(self, samples: Sequence[Sample], *, dimension: int, seed: int) -> PolicyScores:
        """Return the projected score of each sample (see :mod:`megatron_dypo.models.gradient_projection`).

        Args:
            dimension: d; 0: the whole gradient.
            seed: of the projection.
        """

    def update(self, weighted: Sequence[Sample]) -> UpdateReport:
        """Make one optimizer step from the samples of all replicas, which have their token weights."""

    def refresh_reference(self) -> None:
        """Make the current weights the reference. Call it only if ``keeps_reference``."""

    def bad_weight(self) -> str | None:
        """Return the name of the first weight with a value that is not finite, on any rank; None if there is none.

        A router bias, which no gradient trains, is a weight too.
        """

    def bad_gradient(self) -> str | None:
        """Return the name of the first parameter whose last gradient is not finite, on any rank; None if there is
        none."""

    def bad_microbatches(self, report: UpdateReport) -> list[int]:
        """Run each microbatch of this replica alone; return those whose loss or gradient is not finite. The gradients
        of the last update are lost."""

    def weights_digest(self) -> str:
        """Return a digest that is equal for equal weights; see :mod:`megatron_dypo.loop.journal.weights`."""

    def save(
        self,
        root: Path,
        step: int,
        *,
        trainer_state: Mapping[str, object],
        leader_state: bytes,
        stop_ids: Sequence[int],
        cfg: CheckpointConfig,
        waits: bool = True,
        on_publish: Callable[[], object] = lambda: None,
    ) -> Path:
        """Write a checkpoint of step ``step`` (see ``mcore.checkpoints.checkpoint.begin_save``); return its folder.

        Args:
            waits: the folder is there when this returns. Otherwise it is written while training goes on, and
                :meth:`finish_save` must be called.
            on_publish: called on every rank once the folder is there.
        """

    def finish_save(self, *, waits: bool) -> None:
        """Publish the checkpoint that is being written, if it is written or with ``waits``. Collective over the world.

        Raises:
            OSError: the file system is full. Nothing is left of that checkpoint.
        """

    def load(self, path: Path) -> object:
        """Bring weights, optimizer, RNG states and a refreshed reference back from a checkpoint."""

    def export(self, out_dir: Path, *, stop_ids: Sequence[int]) -> None:
        """Write the weights as a Hugging Face model folder, whose generation ends at ``stop_ids``."""
