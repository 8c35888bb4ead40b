"""The log-probs of a group do not depend on the groups that are scored with it, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.dist.spawn import run_ranks
from tests.support.hf_models import make_hf_model


def rank_scores(path: str, axes: dict[str, Any], lengths: list[list[int]]) -> dict[str, list[bytes]]:
    """Return the log-probs of every sample: of all groups together, and of each group alone."""
    from megatron_dypo.config.model import ModelConfig, ParallelConfig
    from megatron_dypo.mcore.logprobs import sequence_logprobs
    from megatron_dypo.mcore.model import build_model, load_initial_weights
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.models.architecture import load_architecture
    from megatron_dypo.parallel.groups import close
    from megatron_dypo.types import Sample, SampleKind, Treatment

    parallel = ParallelConfig(**axes)
    layout, arch = start_megatron(parallel), load_architecture(path)
    model = ModelConfig(hf_path=path, dtype="float32")
    chunks = build_model(arch, model, parallel, layout)
    load_initial_weights(chunks, model, arch, layout)
    generator = np.random.default_rng(1)
    groups = [
        [
            Sample(
                order=order,
                member=member,
                treatment=Treatment.REINFORCE,
                kind=SampleKind.ROLLOUT,
                tokens=generator.integers(0, arch.vocab_size, length, dtype=np.int32),
                num_prompt_tokens=2,
                policy_version=0,
                is_correct=True,
                reward=1.0,
            )
            for member, length in enumerate(group)
        ]
        for order, group in enumerate(lengths)
    ]
    flat = [sample for group in groups for sample in group]

    def score(samples: list[Sample], by_group: bool) -> list[bytes]:
        found = sequence_logprobs(chunks, samples, layout=layout, budget=64, by_group=by_group) or []
        return [logp.tobytes() for logp in found]

    scores = {
        "together": score(flat, True),
        "alone": [logp for group in groups for logp in score(group, True)],
        "in any pack": score(flat, False),
    }
    close(layout)
    return scores


@pytest.mark.parametrize("axes", [{}, {"tensor": 2}, {"pipeline": 2, "virtual_pipeline": 2}], ids=str)
def test_a_group_scored_with_others_has_the_bits_of_the_group_alone(tmp_path: Path, axes: dict[str, Any]) -> None:
    model = make_hf_model("qwen3", tmp_path / "model", seed=1, num_hidden_layers=4)
    ranks = 2 if axes else 1
    scores = run_ranks(ranks, rank_scores, str(model), axes, [[9, 23, 14], [31, 30], [5], [12, 60, 7, 8]])[0]
    assert len(scores["together"]) == 10
    assert scores["together"] == scores["alone"]
    together, packed = (
        np.concatenate([np.frombuffer(logp, np.float32) for logp in scores[name]])
        for name in ("together", "in any pack")
    )
    np.testing.assert_allclose(together, packed, atol=1e-5)
