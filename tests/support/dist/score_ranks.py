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
