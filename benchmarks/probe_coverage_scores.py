"""Projected scores of the pool of ``probe_coverage.py``, by Megatron in a process of its own."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from probe_coverage_pool import Rollouts, is_mid, read_pool

from megatron_dypo.config.model import ModelConfig, ParallelConfig
from megatron_dypo.mcore import features
from megatron_dypo.mcore.start import start_megatron
from megatron_dypo.metrics.progress import progress
from megatron_dypo.models.architecture import load_architecture
from megatron_dypo.models.gradient_projection import RandomProjection
from megatron_dypo.parallel.groups import close
from megatron_dypo.probe.scores import Scores, save
from megatron_dypo.types import Floats, Sample, SampleKind, Treatment

DIMENSION = 4096


def score(folder: Path, model: str, reference: str, group_size: int, seed: int) -> dict[str, float]:
    """Write ``scores.npz`` beside the pool; return the number of scores and the seconds that they took."""
    pool = read_pool(folder / "pool.json")
    kept_N = is_mid(pool, group_size)
    samples = [sample for index, one in enumerate(pool) for sample in _samples(index, one)]
    kept = [sample for sample, is_kept in zip(samples, kept_N, strict=True) if is_kept]
    score_Nd, ratio_N = np.zeros((len(samples), DIMENSION), np.float32), np.zeros(len(samples))
    score_Nd[kept_N], ratio_N[kept_N], seconds = _by_megatron(kept, model, reference, seed)
    is_correct_N = np.array([sample.is_correct for sample in samples])
    scores = Scores(
        score_Nd=score_Nd,
        prompt_N=np.array([sample.order for sample in samples], np.int64),
        repeat_N=np.array([sample.member // group_size for sample in samples], np.int64),
        teacher_N=np.full(len(samples), -1, np.int64),
        is_correct_N=is_correct_N,
        reward_N=is_correct_N.astype(np.float64),
        length_N=np.array([sample.num_response_tokens for sample in samples], np.int64),
        log_ratio_N={"old": np.zeros(len(samples)), "frozen": ratio_N},
        prompt_ids=tuple(one.prompt_id for one in pool),
        teachers=(),
        step=0,
    )
    save(scores, folder / "scores.npz")
    return {"scores": len(kept), "seconds": seconds}


def _by_megatron(
    samples: list[Sample], model: str, reference: str, seed: int
) -> tuple[Floats, NDArray[np.float64], float]:
    """Return [N, d] scores, [N] Σ log π − log π_ref, and the seconds of the scores."""
    features.shield_imports()
    from megatron_dypo.mcore.logprobs import sequence_logprobs
    from megatron_dypo.mcore.model import build_model, load_initial_weights
    from megatron_dypo.mcore.scores import sequence_scores

    parallel = ParallelConfig()
    layout, arch = start_megatron(parallel), load_architecture(model)
    chunks = build_model(arch, ModelConfig(hf_path=model, dtype="float32"), parallel, layout)
    totals = []
    for path in (reference, model):
        with torch.no_grad():
            load_initial_weights(chunks, ModelConfig(hf_path=path, dtype="float32"), arch, layout)
        logps = sequence_logprobs(chunks, samples, layout=layout, budget=1024)
        assert logps is not None, "the only rank is the leader"
        totals.append(np.array([logp.sum(dtype=np.float64) for logp in logps]))
    start = time.monotonic()
    with progress(len(samples), "scores", "trajectories") as bar:
        projection = RandomProjection(DIMENSION, seed)
        scores = sequence_scores(chunks, samples, projection, arch=arch, layout=layout, bar=bar)
        found = np.stack([score.score_d for score in scores])
    seconds = time.monotonic() - start
    close(layout)
    return found, totals[1] - totals[0], seconds


def _samples(order: int, one: Rollouts) -> list[Sample]:
    return [
        Sample(
            order=order,
            member=member,
            treatment=Treatment.REINFORCE,
            kind=SampleKind.ROLLOUT,
            tokens=np.array(one.prompt + response, np.int32),
            num_prompt_tokens=len(one.prompt),
            policy_version=0,
            is_correct=correct,
        )
        for member, (response, correct) in enumerate(zip(one.responses, one.correct, strict=True))
    ]
