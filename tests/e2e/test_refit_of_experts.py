"""Refits of a mixture of experts from ranks that share out its experts into a real SGLang server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dypo.rollout.server.servers import ServerPool
from tests.support.dist.spawn import run_ranks
from tests.support.e2e.refitting_ranks import Servers, Trainer, ask
from tests.support.hf_models import import_transformers, make_hf_model

TOKENS = list(range(3, 40))
# On a CPU SGLang pads experts to a multiple of 64 features, which planned refits refuse.
FEATURES: dict[str, Any] = {"moe_intermediate_size": 64}
BODY = {
    "input_ids": TOKENS,
    "sampling_params": {"max_new_tokens": 1},
    "return_logprob": True,
    "logprob_start_len": 0,
}


@pytest.fixture(scope="module")
def servers(sglang_servers: Callable[..., ServerPool], tmp_path_factory: pytest.TempPathFactory) -> Servers:
    model = make_hf_model("qwen3_moe", tmp_path_factory.mktemp("models") / "served", **FEATURES)
    pool = sglang_servers(model, per_node=1)
    assert pool.api_key is not None
    return Servers(urls=pool.urls, api_key=pool.api_key, served=str(model), run_dir=str(tmp_path_factory.mktemp("run")))


def rank_refits(servers: Servers, models: dict[str, str], axes: dict[str, int]) -> dict[str, Any]:
    """Refit the model of each transport twice, the second time over the connections of the first.

    Return, on rank 0, the server's answer about :data:`TOKENS` after the second refit.
    """
    from megatron_dypo.parallel.groups import close

    trainer, seen, version = Trainer(servers, **axes), {}, 0
    for transport, model in models.items():
        trainer.become(model)
        refitter = trainer.refitter(transport=transport)
        for _ in range(2):
            version += 1
            refitter.refit(version)
        refitter.close()
        if trainer.layout.rank == 0:
            seen[transport] = version, ask(servers, servers.urls[0], "/generate", BODY)["meta_info"]
    close(trainer.layout)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "axes", "seeds"),
    [
        (2, {"tensor": 2, "sequence": True, "expert": 2}, {"broadcast": 1, "p2p": 2}),
        (4, {"pipeline": 2, "expert": 2}, {"broadcast": 3, "local": 4}),
        (2, {"expert": 2}, {"disk": 5}),
    ],
)
def test_the_server_samples_from_what_was_refitted(
    world_size: int, axes: dict[str, int], seeds: dict[str, int], servers: Servers, tmp_path: Path
) -> None:
    models = {name: make_hf_model("qwen3_moe", tmp_path / name, seed=seed, **FEATURES) for name, seed in seeds.items()}
    seen = run_ranks(world_size, rank_refits, servers, {name: str(path) for name, path in models.items()}, axes)[0]
    for transport, model in models.items():
        version, meta = seen[transport]
        assert meta["weight_version"] == str(version)
        served = [logp for logp, *_ in meta["input_token_logprobs"][1:]]
        np.testing.assert_allclose(served, _logps(model), atol=1e-5, rtol=0, err_msg=transport)


@torch.no_grad()
def _logps(model: Path) -> np.ndarray:
    oracle = import_transformers().AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    logp_LV = torch.log_softmax(oracle(torch.tensor(TOKENS)[None]).logits[0], dim=-1)
    return logp_LV[:-1].gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0].numpy()
