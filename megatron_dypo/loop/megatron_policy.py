"""The policy on Megatron-Core: model chunks, optimizer and reference of this rank."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from megatron_dypo.batching.exchange import balance, broadcast_samples
from megatron_dypo.batching.pack import padding_ratio
from megatron_dypo.batching.wire import without_arrays
from megatron_dypo.config.run import CheckpointConfig
from megatron_dypo.config.tree import Config
from megatron_dypo.loop.journal.weights import weights_digest
from megatron_dypo.loop.policy import PolicyScores, UpdateReport
from megatron_dypo.mcore.bridged.weights import BridgedWeights
from megatron_dypo.mcore.checkpoints import checkpoint
from megatron_dypo.mcore.checkpoints.folder import folder_of
from megatron_dypo.mcore.checkpoints.saving import Saver
from megatron_dypo.mcore.chunks import named_global_weights
from megatron_dypo.mcore.finite import Lone, bad_microbatches, first_not_finite, named_gradients
from megatron_dypo.mcore.forward_step import add_over_ranks, loss_pass
from megatron_dypo.mcore.fp8 import named_values, values
from megatron_dypo.mcore.logprobs import own_parts, pack_microbatches, plan_update, sequence_logprobs
from megatron_dypo.mcore.moe_router import balance_metrics
from megatron_dypo.mcore.optimizer import PolicyOptimizer
from megatron_dypo.mcore.reduction import until_reduction
from megatron_dypo.mcore.reference import ReferencePolicy
from megatron_dypo.mcore.route_recorder import RouteRecorder
from megatron_dypo.mcore.routing_replay import RoutingReplay
from megatron_dypo.mcore.scores import sequence_scores
from megatron_dypo.metrics.progress import progress
from megatron_dypo.metrics.writer import Timings
from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.bridged import WholeWeights
from megatron_dypo.models.export import export_hf
from megatron_dypo.models.flops import model_cost, sequence_cost
from megatron_dypo.models.gradient_projection import RandomProjection, WholeGradient
from megatron_dypo.objective.recipes.base import Objective
from megatron_dypo.parallel.collectives import gather_floats, gather_objects
from megatron_dypo.parallel.groups import MeshRank
from megatron_dypo.types import Floats, Routes, Sample


@dataclass(frozen=True, kw_only=True)
class MegatronPolicy:
    """One rank's part of the policy; see :class:`megatron_dypo.loop.policy.Policy`."""

    config: Config
    layout: MeshRank
    arch: Architecture
    chunks: Sequence[torch.nn.Module]
    optimizer: PolicyOptimizer
    objective: Objective
    reference: ReferencePolicy | None
    """None if the objective reads no reference, or uses π_old as the reference."""
    timings: Timings
    saver: Saver = field(default_factory=Saver)
    replay: RoutingReplay | None = None
    """None: the routers choose the experts in every pass (``objective.replay: off``), or there are none."""

    @property
    def keeps_reference(self) -> bool:
        return self.reference is not None

    def logprobs(self, samples: Sequence[Sample]) -> list[Floats]:
        return self.replica_logprobs(self._of_leader(samples))

    def reference_logprobs(self, samples: Sequence[Sample]) -> list[Floats]:
        assert self.reference is not None, "this run keeps no reference"
        with self.reference.swapped_in():
            # The reference is another policy. It takes its own choice of experts.
            return self._score(self._of_leader(samples), entropy=False, replay=None)

    def replica_logprobs(self, samples: Sequence[Sample]) -> list[Floats]:
        return self._score(samples, entropy=False, replay=self.replay)

    def logprobs_and_routes(self, samples: Sequence[Sample]) -> tuple[list[Floats], list[Routes]]:
        assert self.replay is not None, "this run replays no routes"
        recorder = RouteRecorder(self.replay)
        logprobs = self._score(self._of_leader(samples), entropy=False, replay=None, recorder=recorder)
        return logprobs, recorder.routes

    def own_choice_logprobs(self, samples: Sequence[Sample]) -> list[Floats]:
        return self._score(self._of_leader(samples), entropy=False, replay=None)

    def entropies(self, samples: Sequence[Sample]) -> list[Floats]:
        return self._score(self._of_leader(samples), entropy=True, replay=self.replay)

    def scores(self, samples: Sequence[Sample], *, dimension: int, seed: int) -> PolicyScores:
        layout, own = self.layout, range(len(samples))
        if layout.mesh.replicas_share_experts and layout.leaders_group is not None:
            # All replicas compute every score together.
            parts = gather_objects([without_arrays(sample) for sample in samples], layout.leaders_group)
            first = sum(len(part) for part in parts[: layout.dp_rank])
            own = range(first, first + len(samples))
            samples = [sample for part in parts for sample in part]
        samples = self._of_leader(samples)
        gradient_map = RandomProjection(dimension, seed) if dimension else WholeGradient(self.arch)
        found = PolicyScores(
            score_Nd=np.empty((len(own), gradient_map.size), np.float32), logp_N=np.empty(len(own), np.float64)
        )
        with progress(len(samples), "scores", "trajectories", enabled=layout.is_global_leader) as bar:
            scores = sequence_scores(
                self.chunks,
                samples,
                gradient_map,
                arch=self.arch,
                layout=layout,
                token_multiple=self.config.token_multiple,
                bar=bar,
                replay=self.replay,
            )
            for index, score in enumerate(scores):
                if index in own:
                    found.score_Nd[index - own.start] = score.score_d
                    found.logp_N[index - own.start] = score.logp
        return found

    def update(self, weighted: Sequence[Sample]) -> UpdateReport:
        """Spread the samples over replicas, pack them, and make one optimizer step from all of them."""
        layout, cost = self.layout, sequence_cost(self.arch, self.config.model.recompute)
        leaders = layout.leaders_group
        samples = broadcast_samples(
            balance(weighted, leaders, cost.of) if leaders is not None else None, layout.replica_group
        )
        costs = [cost.of(sample) for sample in samples]
        bins = plan_update(samples, costs, layout, budget=self.config.batching.tokens_per_microbatch)
        microbatches = pack_microbatches(
            samples, bins, layout, token_multiple=self.config.token_multiple, streams=self.objective.streams
        )
        parts = own_parts(microbatches, samples, layout, self.replay)
        differences = self._route_difference("train/replay/route_difference_old")
        with self.timings.measure("update_actor"):
            self.optimizer.zero_grad()
            with (
                self.timings.inside("forward_backward"),
                progress(len(parts), "update", "microbatches", enabled=layout.is_global_leader) as bar,
                until_reduction(self.chunks) as busy,
            ):
                sums = loss_pass(self.chunks, parts, objective=self.objective, context_group=layout.cp_group, bar=bar)
            with self.timings.inside("optimizer_step"):
                applied = self.optimizer.step()
        paces = gather_floats([busy.seconds, sum(costs)])
        metrics = {
            "train/grad_norm": applied.grad_norm,
            "train/lr": applied.lr,
            "train/skipped": float(not applied.ok),
            "train/num_microbatches": len(microbatches),
            "train/padding_ratio": padding_ratio(microbatches),
            **balance_metrics(self.chunks),
            **differences,
            **self._route_difference("train/replay/route_difference"),
        }
        return UpdateReport(
            is_applied=applied.ok,
            sums=add_over_ranks(sums, layout),
            metrics=metrics,
            flops=sum(costs),
            model_flops=0.0 if self.arch.is_bridged else sum(map(model_cost(self.arch).of, samples)),
            samples=samples,
            bins=bins,
            busy_s=[seconds for seconds, _ in paces],
            work=[flops for _, flops in paces],
        )

    def bad_microbatches(self, report: UpdateReport) -> list[int]:
        return bad_microbatches(self.lone, report.samples, report.bins)

    @property
    def lone(self) -> Lone:
        """The parts that run one microbatch alone."""
        return Lone(
            chunks=self.chunks,
            objective=self.objective,
            layout=self.layout,
            token_multiple=self.config.token_multiple,
            replay=self.replay,
        )

    def _route_difference(self, name: str) -> dict[str, float]:
        return {} if self.replay is None else self.replay.take_difference(name)

    def refresh_reference(self) -> None:
        if self.reference is not None:
            self.reference.capture()

    def bad_weight(self) -> str | None:
        return first_not_finite(named_values(self.chunks))

    def bad_gradient(self) -> str | None:
        return first_not_finite(named_gradients(self.chunks))

    def weights_digest(self) -> str:
        return weights_digest(named_values(self.chunks))

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
        is_refreshed = self.config.objective.reference.mode == "refreshed"
        begin = functools.partial(
            checkpoint.begin_save,
            root,
            step,
            chunks=self.chunks,
            optimizer=self.optimizer,
            layout=self.layout,
            trainer_state=trainer_state,
            leader_state=leader_state,
            reference=self.reference if is_refreshed else None,
            hf_path=self.config.model.hf_path,
            stop_ids=stop_ids,
            cfg=cfg,
        )
        self.saver.begin(begin, waits=waits, on_publish=on_publish)
        return folder_of(root, step)

    def finish_save(self, *, waits: bool) -> None:
        if waits:
            self.saver.finish()
        else:
            self.saver.poll()

    def load(self, path: Path) -> checkpoint.Restored:
        """Bring weights, optimizer, RNG states and reference back from a checkpoint; return the rest of it."""
        return checkpoint.load(
            path, chunks=self.chunks, optimizer=self.optimizer, layout=self.layout, reference=self.reference
        )

    def export(self, out_dir: Path, *, stop_ids: Sequence[int]) -> None:
        export_hf(
            named_global_weights(self.chunks),
            self.arch,
            self.layout,
            values=values,
            out_dir=out_dir,
            reference_hf_path=self.config.model.hf_path,
            stop_ids=stop_ids,
            whole=self.whole_weights(),
        )

    def whole_weights(self) -> WholeWeights | None:
        """Return the whole weights of a model without a name table; None if it has one. Collective over the world."""
        return BridgedWeights(self.config.model.hf_path, self.chunks, self.layout) if self.arch.is_bridged else None

    def _of_leader(self, samples: Sequence[Sample]) -> list[Sample]:
        """Send the tokens of the leader's samples to the other ranks of its replica; return them."""
        bare = [without_arrays(sample) for sample in samples] if self.layout.is_replica_leader else None
        return broadcast_samples(bare, self.layout.replica_group)

    def _score(
        self,
        samples: Sequence[Sample],
        *,
        entropy: bool,
        replay: RoutingReplay | None,
        recorder: RouteRecorder | None = None,
    ) -> list[Floats]:
        found = sequence_logprobs(
            self.chunks,
            samples,
            layout=self.layout,
            budget=self.config.batching.tokens_per_microbatch,
            token_multiple=self.config.token_multiple,
            entropy=entropy,
            # Groups of a stream come at times of their own.
            by_group=self.config.rollout.uses_stream,
            replay=replay,
            recorder=recorder,
        )
        return found or []
