"""R2: the experts that all ranks chose come to the leader as a transformers model chooses them, and replaying them
changes nothing under the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dypo.types import Sample, SampleKind, Treatment
from tests.support.dist.literal_objective import float64_model
from tests.support.dist.spawn import run_ranks
from tests.support.hf_models import make_hf_model

LENGTHS = (5, 17, 8, 2, 11, 30)
SP, VPP = {"tensor": 2, "sequence": True}, {"pipeline": 2, "virtual_pipeline": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "tp2 sp ep2": (2, {**SP, "expert": 2}),
    "tp2 sp etp2": (2, {**SP, "expert_tensor": 2}),
    "pp2, 3 + 1 layers": (2, {"pipeline": 2, "last_stage_layers": 1}),
    "pp2 vpp2": (2, VPP),
    "tp2 sp cp2 ep2": (4, {**SP, "context": 2, "expert": 2}),
}


def make_samples() -> list[Sample]:
    generator = np.random.default_rng(1)
    return [
        Sample(
            order=order,
            member=0,
            treatment=Treatment.REINFORCE,
            kind=SampleKind.ROLLOUT,
            tokens=generator.integers(0, 131, length, dtype=np.int32),
            num_prompt_tokens=1,
            policy_version=0,
        )
        for order, length in enumerate(LENGTHS)
    ]


def rank_records(path: str, axes: dict[str, Any]) -> tuple[list[Any], list[list[Any]], dict[str, float]]:
    """Return routes, log-probs (chosen, then replayed) and the share of tokens that the replay changed."""
    import dataclasses

    from megatron_dypo.batching.exchange import broadcast_samples
    from megatron_dypo.config.model import ModelConfig, ParallelConfig
    from megatron_dypo.mcore.logprobs import sequence_logprobs
    from megatron_dypo.mcore.model import build_model, load_initial_weights
    from megatron_dypo.mcore.route_recorder import RouteRecorder
    from megatron_dypo.mcore.routing_replay import install
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.models.architecture import load_architecture
    from megatron_dypo.parallel.groups import close

    parallel = ParallelConfig(**axes)
    layout, arch = start_megatron(parallel), load_architecture(path)
    model = ModelConfig(hf_path=path, dtype="float32")
    chunks = build_model(arch, model, parallel, layout)
    load_initial_weights(chunks, model, arch, layout)
    replay = install(chunks, arch, layout)
    samples, recorder = make_samples(), RouteRecorder(replay)
    logps = [sequence_logprobs(chunks, samples, layout=layout, budget=40, recorder=recorder) or []]
    routed = [dataclasses.replace(s, routes=r) for s, r in zip(samples, recorder.routes, strict=False)]
    again = broadcast_samples(routed if layout.is_replica_leader else None, layout.replica_group)
    logps.append(sequence_logprobs(chunks, again, layout=layout, budget=40, replay=replay) or [])
    metrics = replay.take_difference("difference")
    close(layout)
    return recorder.routes, logps, metrics


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_model("qwen3_moe", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def literal(model: Path) -> list[Any]:
    """Return the [L, layers, k] experts of a transformers model in float64, ascending in each row."""
    hf, found = float64_model(str(model)), []
    for sample in make_samples():
        chosen: list[torch.Tensor] = []

        def note(*call: Any, chosen: list[torch.Tensor] = chosen) -> None:
            chosen.append(call[2][2])

        handles = [layer.mlp.gate.register_forward_hook(note) for layer in hf.model.layers]
        hf(torch.tensor(sample.tokens.astype("int64"))[None])
        for handle in handles:
            handle.remove()
        found.append(torch.stack(chosen, dim=1).sort(dim=-1).values.numpy())
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_leader_gets_the_experts_of_every_token_and_layer(name: str, model: Path, literal: list[Any]) -> None:
    ranks, axes = LAYOUTS[name]
    seen = run_ranks(ranks, rank_records, str(model), axes, deadline_s=240)
    routes, (chosen, replayed), metrics = seen[0]
    assert all(not other[0] and not other[1][0] for other in seen[1:]), "only the leader"
    for found, expected in zip(routes, literal, strict=True):
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(np.sort(found, axis=-1), expected)
    assert metrics == {"difference": 0.0}
    for before, after in zip(chosen, replayed, strict=True):
        np.testing.assert_allclose(after, before, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "axes"),
    [
        ("deepseek_v3", {**SP, "expert": 2}),
        ("deepseek_v3", {"pipeline": 2, "first_stage_layers": 1}),
        ("glm4_moe", {**SP, "expert": 2}),
    ],
)
def test_a_biased_router_behind_a_dense_layer_replays_its_own_choice(
    tmp_path: Path, kind: str, axes: dict[str, Any]
) -> None:
    """The second layout's first stage, which has the leader, has no experts."""
    path = make_hf_model(kind, tmp_path / "model")
    routes, (chosen, replayed), metrics = run_ranks(2, rank_records, str(path), axes, deadline_s=240)[0]
    assert metrics == {"difference": 0.0}
    for before, after in zip(chosen, replayed, strict=True):
        np.testing.assert_allclose(after, before, atol=1e-6)
    for found in routes:
        is_known = (found != 255).all(axis=(0, 2))
        assert is_known.any()
        assert not is_known[0], "the first layer is dense"
        ordered = np.sort(found[:, is_known], axis=-1)
        assert (ordered[..., 1:] > ordered[..., :-1]).all()
