"""Gradients of the same trajectories under one parallel layout, as projections that no layout changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_dypo.config.model import ModelConfig, ParallelConfig
from megatron_dypo.mcore.model import build_model, load_initial_weights
from megatron_dypo.mcore.scores import sequence_scores
from megatron_dypo.models.architecture import load_architecture
from megatron_dypo.models.gradient_projection import RandomProjection
from megatron_dypo.parallel.groups import MeshRank
from megatron_dypo.types import Sample
from tools.gpu_parts.synthetic import CheckSizes, Dtype, make_samples

_SIZE, _SEED, _NUM_SAMPLES = 4096, 1, 2


def score_layout(layout: MeshRank, path: Path, dtype: Dtype, parallel: ParallelConfig) -> dict[str, Any]:
    """Return the projected gradient of the log-probability of each of a few trajectories, on the first rank."""
    arch, model = load_architecture(path), ModelConfig(hf_path=str(path), dtype=dtype)
    chunks = build_model(arch, model, parallel, layout)
    load_initial_weights(chunks, model, arch, layout)
    samples = _samples(arch.vocab_size)
    scores = sequence_scores(chunks, samples, RandomProjection(_SIZE, _SEED), arch=arch, layout=layout)
    return {"scores": [score.score_d.tolist() for score in scores]}


def _samples(vocab: int) -> list[Sample]:
    return make_samples(CheckSizes(hidden=64, head_dim=32, vocab=vocab, tokens=1024, length=64))[:_NUM_SAMPLES]
