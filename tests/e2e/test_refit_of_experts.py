"""Refits of a mixture of experts from ranks that share out its experts into a real SGLang server."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.dist.spawn import run_ranks
from tests.support.e2e.refitting_ranks import Servers, ask
from tests.support.hf_models import import_transformers, make_hf_model

TOKENS = list(range(3, 40))
# On a CPU SGLang pads experts to a multiple of 64 features, which planned refits refuse.
FEATURES = {"moe_intermediate_size": 64}


@pytest.fixture(scope="module")
def servers(sglang_servers, tmp_path_factory):
    model = make_hf_model("qwen3_moe", tmp_path_factory.mktemp("models") / "served", **FEATURES)
    pool = sglang_servers(model, per_node=1)
    return Servers(urls=pool.urls, api_key=pool.api_key, served=str(model), run_dir=str(tmp_path_factory.mktemp("run")))


def rank_refit(servers: Servers, model: str, axes: dict, transport: str) -> None:
    """Load ``model`` and refit it twice, the second time over the connections of the first."""
    from megatron_dypo.config.model import ModelConfig, ParallelConfig
    from megatron_dypo.config.refit import RefitConfig
    from megatron_dypo.mcore.chunks import named_global_parameters
    from megatron_dypo.mcore.model import build_model, load_initial_weights
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.models.architecture import load_architecture
    from megatron_dypo.parallel.groups import close
    from megatron_dypo.refit.refitter import Refitter

    parallel = ParallelConfig(**axes)
    layout = start_megatron(parallel)
    arch, config = load_architecture(model), ModelConfig(hf_path=model, dtype="float32")
    chunks = build_model(arch, config, parallel, layout)
    load_initial_weights(chunks, config, arch, layout)
    refitter = Refitter(
        layout,
        arch,
        lambda: named_global_parameters(chunks),
        urls=servers.urls,
        api_key=servers.api_key,
        config=RefitConfig(transport=transport, bucket_mib=1, deadline_s=60.0),
        run_dir=Path(servers.run_dir),
        hf_reference=Path(servers.served),
    )
    refitter.refit(1)
    refitter.refit(2)
    refitter.close()
    close(layout)


@pytest.mark.parametrize(
    ("seed", "world_size", "axes", "transport"),
    [
        (1, 2, {"tensor": 2, "sequence": True, "expert": 2}, "broadcast"),
        (2, 4, {"pipeline": 2, "expert": 2}, "broadcast"),
        (3, 2, {"expert": 2}, "disk"),
        (4, 2, {"tensor": 2, "sequence": True, "expert": 2}, "p2p"),
        (5, 4, {"pipeline": 2, "expert": 2}, "local"),
    ],
)
def test_the_server_samples_from_what_was_refitted(seed, world_size, axes, transport, servers, tmp_path):
    model = make_hf_model("qwen3_moe", tmp_path / "new", seed=seed, **FEATURES)
    run_ranks(world_size, rank_refit, servers, str(model), axes, transport)
    body = {
        "input_ids": TOKENS,
        "sampling_params": {"max_new_tokens": 1},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    meta = ask(servers, servers.urls[0], "/generate", body)["meta_info"]
    assert meta["weight_version"] == "2"
    served = [logp for logp, *_ in meta["input_token_logprobs"][1:]]
    np.testing.assert_allclose(served, _logps(model), atol=1e-5, rtol=0)


@torch.no_grad()
def _logps(model: Path) -> np.ndarray:
    oracle = import_transformers().AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    logp_LV = torch.log_softmax(oracle(torch.tensor(TOKENS)[None]).logits[0], dim=-1)
    return logp_LV[:-1].gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0].numpy()
