"""Refits of gpt-oss into a real SGLang server: sinks, windows, biases and stacked experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megatron_dypo.rollout.server.servers import ServerPool
from tests.support.e2e.refitted_logps import assert_served
from tests.support.e2e.refitting_ranks import Servers
from tests.support.hf_models import make_hf_model
from tests.support.slow import slow_unless

# On a CPU SGLang pads each rank's part of experts to a multiple of 64 features, which planned refits refuse.
FEATURES: dict[str, Any] = {"intermediate_size": 128}


def make_model(path: Path, seed: int) -> Path:
    """Make a model whose sinks bf16 can hold, as SGLang has no other type for them."""
    make_hf_model("gpt_oss", path, seed=seed, **FEATURES)
    weights = load_file(path / "model.safetensors")
    for name in [name for name in weights if name.endswith("sinks")]:
        weights[name] = weights[name].bfloat16().float()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module", params=slow_unless(lambda count: count == 1, (1, 2)))
def servers(
    request: pytest.FixtureRequest,
    sglang_servers: Callable[..., ServerPool],
    tmp_path_factory: pytest.TempPathFactory,
) -> Servers:
    """Start a server with this many tensor-parallel ranks."""
    model = make_model(tmp_path_factory.mktemp("models") / "gpt_oss", 0)
    pool = sglang_servers(model, per_node=1, tensor_parallel=request.param, port=31000 + 100 * request.param)
    assert pool.api_key is not None
    return Servers(urls=pool.urls, api_key=pool.api_key, served=str(model), run_dir=str(tmp_path_factory.mktemp("run")))


def test_the_server_samples_from_what_was_refitted(servers: Servers, tmp_path: Path) -> None:
    assert_served(servers, make_model, tmp_path)
