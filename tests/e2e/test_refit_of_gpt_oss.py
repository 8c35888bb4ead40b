"""Refits of gpt-oss into a real SGLang server: sinks, windows, biases and stacked experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dypo.rollout.server.servers import ServerPool
from tests.support.dist.spawn import run_ranks
from tests.support.e2e.refitting_ranks import Servers, Trainer, ask
from tests.support.hf_models import import_transformers, make_hf_model

TOKENS = list(range(3, 40))
# On a CPU SGLang pads each rank's part of experts to a multiple of 64 features, which planned refits refuse.
FEATURES: dict[str, Any] = {"intermediate_size": 128}
NEW_TOKENS = 4
BODY = {
    "input_ids": TOKENS,
    "sampling_params": {"max_new_tokens": NEW_TOKENS},
    "return_logprob": True,
    "logprob_start_len": 0,
}


def make_model(path: Path, seed: int) -> Path:
    """Make a model whose sinks bf16 can hold, as SGLang has no other type for them."""
    make_hf_model("gpt_oss", path, seed=seed, **FEATURES)
    weights = load_file(path / "model.safetensors")
    for name in [name for name in weights if name.endswith("sinks")]:
        weights[name] = weights[name].bfloat16().float()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module", params=[1, 2])
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


def rank_refits(servers: Servers, models: dict[str, str], axes: dict[str, Any]) -> dict[str, Any]:
    """Refit the model of each transport; return, on rank 0, the server's answer about :data:`TOKENS` after each."""
    from megatron_dypo.parallel.groups import close

    trainer, seen = Trainer(servers, **axes), {}
    for version, (transport, model) in enumerate(models.items(), start=1):
        trainer.become(model)
        refitter = trainer.refitter(transport=transport)
        refitter.refit(version)
        refitter.close()
        if trainer.layout.rank == 0:
            seen[transport] = ask(servers, servers.urls[0], "/generate", BODY)["meta_info"]
    close(trainer.layout)
    return seen


def test_the_server_samples_from_what_was_refitted(servers: Servers, tmp_path: Path) -> None:
    seeds = {"broadcast": 1, "p2p": 2, "local": 3, "disk": 4}
    models = {name: make_model(tmp_path / name, seed) for name, seed in seeds.items()}
    axes = {"tensor": 2, "sequence": True, "expert": 2}
    seen = run_ranks(2, rank_refits, servers, {name: str(path) for name, path in models.items()}, axes)[0]
    for transport, model in models.items():
        meta = seen[transport]
        new = [entry[1] for entry in meta["output_token_logprobs"]]
        served = [entry[0] for entry in (*meta["input_token_logprobs"][1:], *meta["output_token_logprobs"])]
        np.testing.assert_allclose(served, _logps(model, [*TOKENS, *new]), atol=1e-5, rtol=0, err_msg=transport)


@torch.no_grad()
def _logps(model: Path, tokens: list[int]) -> np.ndarray:
    oracle = import_transformers().AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    logp_LV = torch.log_softmax(oracle(torch.tensor(tokens)[None]).logits[0], dim=-1)
    return logp_LV[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()
