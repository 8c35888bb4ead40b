"""Log-probs and projected gradients of several models in one process, for comparisons between devices.

``python -m tests.support.family_scores OUT DTYPE MODEL...`` writes ``OUT``: name → log-probs and scores.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch

SIZE, SEED = 2048, 1


def trajectories(vocab: int) -> list[Any]:
    """Return two trajectories of a group, of which the first half of tokens is the prompt."""
    from megatron_dypo.types import Sample, SampleKind, Treatment

    generator = np.random.default_rng(7)
    return [
        Sample(
            order=0,
            member=member,
            treatment=Treatment.REINFORCE,
            kind=SampleKind.ROLLOUT,
            tokens=generator.integers(3, vocab, length, dtype=np.int32),
            num_prompt_tokens=length // 2,
            policy_version=0,
            is_correct=False,
            reward=0.0,
            rollout_logp=np.zeros(length - length // 2, np.float32),
        )
        for member, length in enumerate((48, 33))
    ]


def score(path: Path, dtype: Any, layout: Any) -> dict[str, torch.Tensor]:
    """Return ``logp`` [R] of all response tokens, and ``scores`` [2, d]."""
    from megatron_dypo.config.model import ModelConfig, ParallelConfig
    from megatron_dypo.mcore.logprobs import sequence_logprobs
    from megatron_dypo.mcore.model import build_model, load_initial_weights
    from megatron_dypo.mcore.scores import sequence_scores
    from megatron_dypo.models.architecture import load_architecture
    from megatron_dypo.models.gradient_projection import RandomProjection

    arch, model = load_architecture(path), ModelConfig(hf_path=str(path), dtype=dtype)
    chunks = build_model(arch, model, ParallelConfig(), layout)
    load_initial_weights(chunks, model, arch, layout)
    samples = trajectories(arch.vocab_size)
    logp = sequence_logprobs(chunks, samples, layout=layout, budget=128)
    assert logp is not None, "one rank leads itself"
    scores = sequence_scores(chunks, samples, RandomProjection(SIZE, SEED), arch=arch, layout=layout)
    return {
        "logp": torch.from_numpy(np.concatenate(logp)),
        "scores": torch.stack([torch.from_numpy(each.score_d) for each in scores]),
    }


def main(out: str, dtype: str, *paths: str) -> None:
    from megatron_dypo.config.model import ParallelConfig
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.parallel.groups import close

    layout = start_megatron(ParallelConfig())
    found = {}
    for path in paths:
        try:
            found[Path(path).name] = score(Path(path), dtype, layout)
        except Exception:  # noqa: BLE001 (one model that fails hides no other; its absence fails its own test)
            traceback.print_exc()
    close(layout)
    torch.save(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
