"""Run one rank of a row of the matrix over layouts: forward and backward passes of the whole objective."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.types import Floats, Microbatch, Sample

if TYPE_CHECKING:
    from megatron_dypo.mcore.routing_replay import RoutingReplay
    from megatron_dypo.models.architecture import Architecture
    from megatron_dypo.parallel.groups import MeshRank


@dataclass(frozen=True, kw_only=True)
class Row:
    """One layout, and the passes that run on it."""

    ranks: int
    axes: dict[str, Any] = field(default_factory=dict)
    """Axes of ``ParallelConfig``. The ranks that they leave over are data parallel."""
    kind: str = "qwen3"
    """Kind of model of ``tests.support.hf_models``."""
    passes: tuple[tuple[int, int | None], ...] = ((0, 2),)
    """(Index of the objective, number of packed rows a replica; None: one sequence a row) of each pass."""
    recompute: Literal["none", "selective", "full"] = "none"
    distributed: bool = False
    """Distributed optimizer."""
    overlap: bool = False
    """Whether the reduction of gradients overlaps the backward pass."""
    replay: bool = False
    """Whether the experts are those of the samples' routes."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The results of one rank for a row."""

    gradients: list[dict[str, Any]]
    """HF name → gradient of this rank's stage, for each pass; {} on ranks that hold the same as another rank."""
    statistics: list[Any]
    """Statistics of each pass, summed over all ranks as the training step sums them."""
    grad_norm: float
    """The optimizer's gradient norm of the last pass."""
    logprobs: dict[tuple[int, int], Any]
    """(order, member) → log-probs of a forward-only pass; on a replica's leader only."""


def rank_rows(
    rows: dict[str, Row],
    ports: Sequence[int],
    paths: dict[str, str],
    groups: Sequence[Sequence[Sample]],
    objectives: Sequence[ObjectiveConfig],
) -> dict[str, Seen]:
    """Run each row in turn, with a store of its own for the rendezvous; ``rows`` and the result are by name."""
    seen: dict[str, Seen] = {}
    for (name, row), port in zip(rows.items(), ports, strict=True):
        try:
            seen[name] = _row(row, port, paths[row.kind], groups, objectives)
        except BaseException as error:
            error.add_note(f"in the row {name!r}")
            raise
    return seen


def _row(
    row: Row, port: int, path: str, groups: Sequence[Sequence[Sample]], objectives: Sequence[ObjectiveConfig]
) -> Seen:
    from megatron_dypo.config.model import ModelConfig, ParallelConfig
    from megatron_dypo.config.training import OptimizerConfig
    from megatron_dypo.mcore.model import build_model, load_initial_weights
    from megatron_dypo.mcore.optimizer import build_optimizer
    from megatron_dypo.mcore.routing_replay import install
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.models.architecture import load_architecture
    from megatron_dypo.parallel.groups import close

    os.environ["MASTER_PORT"] = str(port)
    parallel = ParallelConfig(**row.axes)
    layout = start_megatron(parallel)
    arch = load_architecture(path)
    model = ModelConfig(hf_path=path, dtype="float32", recompute=row.recompute, moe_aux_loss_coef=0.0)
    chunks = build_model(
        arch, model, parallel, layout, distributed_optimizer=row.distributed, overlap_grad_reduce=row.overlap
    )
    load_initial_weights(chunks, model, arch, layout)
    optimizer = build_optimizer(chunks, OptimizerConfig(distributed=row.distributed), dtype="float32", total_steps=1)
    replay = install(chunks, arch, layout) if row.replay else None
    mine, logprobs = _scored(chunks, groups, layout, replay)
    gradients, statistics = [], []
    for objective, count in row.passes:
        optimizer.zero_grad()
        statistics.append(_backward(chunks, mine, groups, objectives[objective], count, layout, replay))
        gradients.append(stage_gradients(chunks, arch, layout, row.distributed))
    grad_norm = optimizer.step().grad_norm
    close(layout)
    return Seen(gradients=gradients, statistics=statistics, grad_norm=grad_norm, logprobs=logprobs)


def _scored(
    chunks: Sequence[torch.nn.Module],
    groups: Sequence[Sequence[Sample]],
    layout: MeshRank,
    replay: RoutingReplay | None,
) -> tuple[list[list[Sample]] | None, dict[tuple[int, int], Floats]]:
    """Return this replica's groups with GAL's log-probs from a forward-only pass, and those log-probs."""
    from megatron_dypo.mcore.logprobs import sequence_logprobs

    mine = [g for g in groups if g[0].order % layout.data == layout.dp_rank]
    flat = [s for g in mine for s in g]
    logps = sequence_logprobs(chunks, on_leader(flat, layout), layout=layout, budget=48, replay=replay)
    if logps is None:
        return None, {}
    logprobs = {(s.order, s.member): logp for s, logp in zip(flat, logps, strict=True)}
    scored = [
        [
            dataclasses.replace(s, current_logp_sum=float(logprobs[s.order, s.member].sum(dtype="float64")))
            for s in group
        ]
        for group in mine
    ]
    return scored, logprobs


def _backward(
    chunks: Sequence[torch.nn.Module],
    mine: Sequence[Sequence[Sample]] | None,
    groups: Sequence[Sequence[Sample]],
    cfg: ObjectiveConfig,
    count: int | None,
    layout: MeshRank,
    replay: RoutingReplay | None,
) -> dict[str, float]:
    """Run the forward and backward passes of one update; return the statistics of its loss."""
    from megatron_dypo.batching.exchange import balance, broadcast_samples
    from megatron_dypo.mcore.forward_step import add_over_ranks, loss_pass
    from megatron_dypo.mcore.logprobs import own_parts
    from megatron_dypo.objective.recipes.registry import build_objective
    from tests.support.objective_cases import totals_of

    samples: list[Sample] | None = None
    objective = build_objective(cfg)
    if mine is not None:
        assert layout.leaders_group is not None
        totals = totals_of(groups)
        weighted: list[Sample] = []
        for group in mine:
            weights = objective.token_weights(group, totals, 0).weights
            weighted += [dataclasses.replace(s, weights=w) for s, w in zip(group, weights, strict=True)]
        samples = balance(weighted, layout.leaders_group)
    samples = broadcast_samples(samples, layout.replica_group)
    microbatches = packed_microbatches(samples, count, layout)
    parts = own_parts(microbatches, samples, layout, replay)
    return add_over_ranks(loss_pass(chunks, parts, objective=objective, context_group=layout.cp_group), layout)


def on_leader(samples: Sequence[Sample], layout: MeshRank) -> list[Sample]:
    """Return the samples with routes on the leader alone, as a run has them."""
    return list(samples) if layout.is_replica_leader else [dataclasses.replace(s, routes=None) for s in samples]


def packed_microbatches(samples: Sequence[Sample], count: int | None, layout: MeshRank) -> list[Microbatch]:
    """Pack ``count`` microbatches for this layout; None: one sequence each."""
    from megatron_dypo.batching.pack import (
        alignment,
        microbatch_length,
        pack,
        padded_lengths,
        plan_microbatches,
        sequence_alignment,
    )
    from megatron_dypo.mcore.logprobs import round_up_microbatches

    per_sequence = sequence_alignment(layout.context)
    lengths = padded_lengths(samples, per_sequence)
    if count is None:
        most = torch.tensor(len(samples))
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        bins = [[i] for i in range(len(samples))]
        bins += [[] for _ in range(round_up_microbatches(int(most), layout) - len(bins))]
    else:
        assert round_up_microbatches(count, layout) == count, "the interleaved schedule's granularity"
        bins = plan_microbatches(lengths, budget=10_000, count=count)
    multiple = alignment(layout.tensor, layout.context)
    return [pack(samples, members, microbatch_length(lengths, [members], multiple), per_sequence) for members in bins]


def stage_gradients(
    chunks: Sequence[torch.nn.Module], arch: Architecture, layout: MeshRank, distributed: bool
) -> dict[str, Any]:
    """Return the whole HF tensors of this stage, each from one of the ranks that hold it."""
    from megatron_dypo.mcore.chunks import main_grad, named_global_parameters
    from megatron_dypo.models.gather import iter_hf_tensors, sent_params

    if distributed:
        _gather_shards(chunks)
    sent = sent_params([(name, main_grad(p)) for name, p in named_global_parameters(chunks)], arch, layout)
    tensors = iter_hf_tensors(sent, arch, layout)
    return {name: tensor.numpy().copy() for name, tensor in tensors}


def _gather_shards(chunks: Sequence[Any]) -> None:
    """Gather gradients: the distributed optimizer leaves each rank the sum of only its own part of every bucket."""
    for buffer in (b for chunk in chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)):
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, own, group=group)
