"""Run one rank of a layout whose trajectories get projected scores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_dypo.types import Floats, Sample

SIZE, SEED = 4096, 3


@dataclass(frozen=True, kw_only=True)
class Row:
    """One layout."""

    axes: dict[str, Any] = field(default_factory=dict)
    kind: str = "qwen3"
    options: dict[str, Any] = field(default_factory=dict)
    """Options of ``build_model``."""
    recompute: str = "none"
    is_probed: bool = False
    """Whether the trajectories of a probe are scored too."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a leader got, by the index of the sample: its whole gradient, its projection, and Σ_t log π."""

    whole: dict[int, Floats]
    projected: dict[int, Floats]
    logp: dict[int, float]
    probed: dict[int, Floats]
    """Index of a probe's trajectory → its projected score."""
    log_ratio: dict[int, float]
    """Index of a probe's trajectory → Σ_t log π − log π_ref; 0 for a trace."""


def rank_scores(
    rows: dict[str, Row],
    ports: Sequence[int],
    paths: dict[str, str],
    samples: Sequence[Sample],
    probed: Sequence[Sample],
) -> dict[str, Seen]:
    """Score the samples under each row in turn; each replica scores its share, or all if replicas share experts.

    Args:
        probed: the trajectories of a probe, for the rows that ``is_probed``.
    """
    return {
        name: _row(row, port, paths[row.kind], samples, probed if row.is_probed else ())
        for (name, row), port in zip(rows.items(), ports, strict=True)
    }


def _row(row: Row, port: int, path: str, samples: Sequence[Sample], probed: Sequence[Sample]) -> Seen:
    from megatron_dypo.config.model import ModelConfig, ParallelConfig
    from megatron_dypo.mcore.model import build_model, load_initial_weights
    from megatron_dypo.mcore.scores import SequenceScore, sequence_scores
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
    found: list[dict[int, SequenceScore]] = []
    projection = RandomProjection(SIZE, SEED)
    for gradient_map, taken in ((WholeGradient(arch), samples), (projection, samples), (projection, probed)):
        mine = {i: one for i, one in enumerate(taken) if is_joint or i % layout.data == layout.dp_rank}
        scores = sequence_scores(chunks, list(mine.values()), gradient_map, arch=arch, layout=layout)
        found.append(dict(zip(mine, scores, strict=True)))
    close(layout)
    if not layout.is_replica_leader:
        assert not any(np.any(one.score_d) or one.logp for part in found for one in part.values())
        return Seen(whole={}, projected={}, logp={}, probed={}, log_ratio={})
    whole, projected, of_probe = ({i: one.score_d for i, one in part.items()} for part in found)
    return Seen(
        whole=whole,
        projected=projected,
        logp={i: one.logp for i, one in found[0].items()},
        probed=of_probe,
        log_ratio={i: _log_ratio(one.logp, mine[i]) for i, one in found[2].items()},
    )


def _log_ratio(logp: float, sample: Sample) -> float:
    """Return Σ_t log π − log π_ref; 0 for a trace, which has no log π_ref here."""
    return 0.0 if sample.ref_logp is None else logp - float(sample.ref_logp.sum(dtype=np.float64))


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
    scored = list(sequence_scores(chunks, flat, WholeGradient(arch), arch=arch, layout=layout))
    scores, ratios = (
        [one.score_d for one in scored],
        [_log_ratio(one.logp, s) for one, s in zip(scored, flat, strict=True)],
    )
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
