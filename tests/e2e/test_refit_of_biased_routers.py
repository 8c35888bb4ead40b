"""Refits of models of the types of DeepSeek-V3 and GLM-4.5 into a real SGLang server. With latent attention it derives
tensors of its own from the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_dypo.rollout.server.servers import ServerPool
from tests.support.e2e.refitted_logps import assert_served
from tests.support.e2e.refitting_ranks import Servers
from tests.support.hf_models import make_hf_model
from tests.support.slow import slow_unless

# On a CPU SGLang pads experts to a multiple of 64 features, which planned refits refuse.
FEATURES: dict[str, Any] = {"moe_intermediate_size": 64}
# The same on each of two ranks, and heads of a multiple of 32 channels.
WIDE: dict[str, Any] = {"moe_intermediate_size": 128, "intermediate_size": 128, "head_dim": 32}
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "deepseek_v3": (1, FEATURES),
    "moonlight": (1, FEATURES),
    "glm4_moe": (2, WIDE),
    "glm4_moe_yarn": (1, FEATURES),
}
"""Kind of model → tensor-parallel ranks of the server, and sizes that it does not pad."""


@pytest.fixture(scope="module", params=slow_unless("moonlight".__eq__, KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def servers(kind: str, sglang_servers: Callable[..., ServerPool], tmp_path_factory: pytest.TempPathFactory) -> Servers:
    tensor_parallel, sizes = KINDS[kind]
    model = make_hf_model(kind, tmp_path_factory.mktemp("models") / kind, **sizes)
    pool = sglang_servers(model, per_node=1, tensor_parallel=tensor_parallel)
    assert pool.api_key is not None
    return Servers(urls=pool.urls, api_key=pool.api_key, served=str(model), run_dir=str(tmp_path_factory.mktemp("run")))


def test_the_server_samples_from_what_was_refitted(kind: str, servers: Servers, tmp_path: Path) -> None:
    def make(path: Path, seed: int) -> Path:
        return make_hf_model(kind, path, seed=seed, **KINDS[kind][1])

    assert_served(servers, make, tmp_path)
