"""A push from ranks with replicas and interleaved stages: each tensor is written once, an error of one is one of all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.dist.spawn import run_ranks
from tests.hf_models import make_hf_model
from tests.unit.weights.fake_sglang import KEY, fake_servers

AXES = {"pipeline": 2, "virtual_pipeline": 2}
WORLD_SIZE = 4  # two replicas of two stages


def rank_push(model: str, urls: list[str], run_dir: str, misshapen_on: int | None) -> tuple[str, int]:
    """A push by disk: (error, bytes)."""
    from megatron_dypo.architecture import load_architecture
    from megatron_dypo.config import ModelConfig, ParallelConfig, WeightsConfig
    from megatron_dypo.mcore.model import build_model, load_initial_weights, named_global_parameters
    from megatron_dypo.parallel.layout import close, init_layout
    from megatron_dypo.weights.bridge import Bridge
    from megatron_dypo.weights.transports.base import PushError

    parallel = ParallelConfig(**AXES)
    layout = init_layout(parallel)
    arch, config = load_architecture(model), ModelConfig(hf_path=model, dtype="float32")
    chunks = build_model(arch, config, parallel, layout)
    load_initial_weights(chunks, config, arch, layout)

    def params():
        for name, parameter in named_global_parameters(chunks):
            yield name, parameter[:1] if layout.rank == misshapen_on else parameter

    bridge = Bridge(
        layout,
        arch,
        params,
        urls=urls,
        api_key=KEY,
        config=WeightsConfig(transport="disk", deadline_s=60.0),
        run_dir=Path(run_dir),
        hf_reference=Path(model),
    )
    try:
        result = "", bridge.push(1).bytes
    except PushError as error:
        result = str(error), 0
    bridge.close()
    close(layout)
    return result


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_hf_model("qwen2", tmp_path_factory.mktemp("models") / "qwen2")


def test_replicas_and_interleaved_stages_write_each_tensor_once(model, tmp_path):
    with fake_servers(2, model_type="qwen2", model_path=str(model)) as servers:
        outcomes = run_ranks(WORLD_SIZE, rank_push, str(model), [s.url for s in servers], str(tmp_path), None)
        assert [server.version for server in servers] == ["1", "1"]
    expected, written = load_file(model / "model.safetensors"), {}
    for file in (tmp_path / "refit" / "version_1").glob("*.safetensors"):
        tensors = load_file(file)
        assert not written.keys() & tensors.keys()
        written.update(tensors)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert outcomes == [("", sum(4 * tensor.numel() for tensor in expected.values()))] * WORLD_SIZE


def test_what_one_rank_finds_wrong_is_raised_on_all(model, tmp_path):
    stage_1_of_first_replica = 2
    with fake_servers(1, model_type="qwen2", model_path=str(model)) as servers:
        outcomes = run_ranks(
            WORLD_SIZE, rank_push, str(model), [servers[0].url], str(tmp_path), stage_1_of_first_replica
        )
        assert "/pause_generation" not in servers[0].posts
    assert len(set(outcomes)) == 1
    assert outcomes[0][0].startswith(f"rank {stage_1_of_first_replica}: decoder.layers.1.")
