"""Run one rank of a layout whose trajectories get projected scores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_dypo.types import Floats, Sample
from tests.support.present import present

SIZE, SEED = 4096, 3


@dataclass(frozen=True, kw_only=True)
class Row:
    """One layout."""

    axes: dict[str, Any] = field(default_factory=dict)
    kind: str = "qwen3"
    options: dict[str, Any] = field(default_factory=dict)
    """Options of ``build_model``."""
    recompute: str = "none"


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The scores that a leader got: index of a sample → its whole gradient, and its projection."""

    whole: dict[int, Floats]
    projected: dict[int, Floats]


def rank_scores(
    rows: dict[str, Row], ports: Sequence[int], paths: dict[str, str], samples: Sequence[Sample]
) -> dict[str, Seen]:
    """Score the samples under each row in turn; each replica scores its share, or all if replicas share experts."""
    return {
        name: _row(row, port, paths[row.kind], samples) for (name, row), port in zip(rows.items(), ports, strict=True)
    }


def _row(row: Row, port: int, path: str, samples: Sequence[Sample]) -> Seen:
    from megatron_dypo.config.model import ModelConfig, ParallelConfig
    from megatron_dypo.mcore.model import build_model, load_initial_weights
    from megatron_dypo.mcore.scores import sequence_scores
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.models.architecture import load_architecture
    from megatron_dypo.models.gradient_projection import RandomProjection, WholeGradient
    from megatron_dypo.parallel.groups import close

    os.environ["MASTER_PORT"] = str(port)
    parallel = ParallelConfig(**row.axes)
    layout = start_megatron(parallel)
    arch = load_architecture(path)
    model = ModelConfig(hf_path=path, dtype="float32", recompute=row.recompute)  # type: ignore[arg-type]
    chunks = build_model(arch, model, parallel, layout, **row.options)
    load_initial_weights(chunks, model, arch, layout)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.grad = parameter.main_grad.fill_(3.0)  # as an fp32 optimizer leaves it
    is_joint = layout.mesh.replicas_share_experts
    mine = [i for i in range(len(samples)) if is_joint or i % layout.data == layout.dp_rank]
    found: list[dict[int, Floats]] = []
    for gradient_map in (WholeGradient(arch), RandomProjection(SIZE, SEED)):
        scores = sequence_scores(chunks, [samples[i] for i in mine], gradient_map, arch=arch, layout=layout)
        found.append(dict(zip(mine, scores, strict=True)))
    close(layout)
    if not layout.is_replica_leader:
        assert not any(np.any(score) for part in found for score in part.values())
        return Seen(whole={}, projected={})
    return Seen(whole=found[0], projected=found[1])


def rank_update(path: str, groups: Sequence[Sequence[Sample]], cfg: Any) -> tuple[Floats, list[Floats], list[float]]:
    """Return the whole gradient of an update at θ = θ_old, each member's whole score, and its Σ log π − log π_ref.

    ``groups`` have log π_ref; log π_old is computed here, so that every ratio is 1.
    """
    import dataclasses

    import torch

    from megatron_dypo.config.model import ModelConfig, ParallelConfig
    from megatron_dypo.mcore.chunks import main_grad, named_global_parameters
    from megatron_dypo.mcore.forward_step import loss_pass
    from megatron_dypo.mcore.logprobs import pack_microbatches, sequence_logprobs
    from megatron_dypo.mcore.model import build_model, load_initial_weights
    from megatron_dypo.mcore.scores import sequence_scores
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.models.architecture import load_architecture
    from megatron_dypo.models.families.registry import match
    from megatron_dypo.models.gradient_projection import ShardProjector, WholeGradient
    from megatron_dypo.objective.recipes.registry import build_objective
    from megatron_dypo.parallel.groups import close
    from tests.support.objective_cases import totals_of

    parallel = ParallelConfig()
    layout, arch = start_megatron(parallel), load_architecture(path)
    model = ModelConfig(hf_path=path, dtype="float32")
    chunks = build_model(arch, model, parallel, layout)
    load_initial_weights(chunks, model, arch, layout)
    flat = [sample for group in groups for sample in group]
    logps = sequence_logprobs(chunks, flat, layout=layout, budget=64) or []
    ratios = [
        float(np.sum(p, dtype=np.float64) - np.sum(present(s.ref_logp), dtype=np.float64))
        for p, s in zip(logps, flat, strict=True)
    ]
    scores = list(sequence_scores(chunks, flat, WholeGradient(arch), arch=arch, layout=layout))
    old = iter(logps)
    objective, weighted = build_objective(cfg), []
    for group in groups:
        known = [
            dataclasses.replace(s, old_logp=logp, rollout_logp=logp) for s in group if (logp := next(old)) is not None
        ]
        weights = objective.token_weights(known, totals_of(groups), 0).weights
        weighted += [dataclasses.replace(s, weights=w) for s, w in zip(known, weights, strict=True)]
    bins = [[index] for index in range(len(weighted))]
    loss_pass(
        chunks,
        pack_microbatches(weighted, bins, layout, token_multiple=1, streams=objective.streams),
        objective=objective,
    )
    projector = ShardProjector(WholeGradient(arch), arch)
    total = torch.zeros(2 * projector.size, dtype=torch.float64)
    for name, parameter in named_global_parameters(chunks):
        projector.add(total, main_grad(parameter), match(name, arch), 0, 1)
    close(layout)
    return projector.signed(total).numpy(), scores, ratios
