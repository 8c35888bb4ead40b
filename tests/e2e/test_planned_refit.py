"""Every way of refitting, from two trainer meshes into real SGLang servers of one and of two ranks, one and two of
them. Each mesh and each size of a server is in one pair; test_planned_transport.py has all other pairs, with stand-ins.

A server must have the same checksum of every tensor as a server that loaded the trainer's HF export.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dypo.config.rollout import ServersConfig
from megatron_dypo.rollout.server.servers import start_servers
from tests.support.dist.spawn import run_ranks
from tests.support.e2e.refitting_ranks import PROMPT, Servers, Trainer, ask, checksums_by_rank
from tests.support.hf_models import import_transformers, make_hf_model

SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 1031, "tie_word_embeddings": True}
MESHES: dict[str, dict[str, int]] = {"TP2×PP2": {"tensor": 2, "pipeline": 2}, "PP2×DP2": {"pipeline": 2}}
PAIRS = [(1, "TP2×PP2"), (2, "PP2×DP2"), (1, "PP2×DP2"), (2, "TP2×PP2")]
"""Ranks of a server, and the mesh of its trainer."""
TRANSPORTS = ("p2p", "local", "broadcast", "disk")


pytestmark = pytest.mark.parametrize(
    ("servers", "mesh"),
    [
        pytest.param(*pair, id=f"TP{pair[0]} servers, {pair[1]}", marks=[pytest.mark.slow] * (pair in PAIRS[1:]))
        for pair in PAIRS
    ],
    indirect=["servers"],
    scope="module",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [make_hf_model("qwen3", folder / name, seed=seed, **SIZES) for seed, name in enumerate("abc")]


@pytest.fixture(scope="module")
def servers(
    request: pytest.FixtureRequest, models: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Servers]:
    cfg = ServersConfig(port=31000, start_deadline_s=900.0, per_node=2, tensor_parallel=request.param)
    with start_servers(cfg, models[0], "float32", tmp_path_factory.mktemp("sglang"), seed=1, device="cpu") as pool:
        run_dir = tmp_path_factory.mktemp("run")
        assert pool.api_key is not None
        yield Servers(urls=pool.urls, api_key=pool.api_key, served=str(models[0]), run_dir=str(run_dir))


def rank_refit_all_ways(servers: Servers, models: list[str], axes: dict[str, int]) -> dict[str, Any]:
    """Return (transport, number of servers) → the servers' and the expected checksums, and the bytes that were sent.

    Also return the rollouts after a refit that followed a release of memory."""
    trainer = Trainer(servers, **axes)
    is_first = trainer.layout.rank == 0
    expected = {model: _loaded_export(trainer, model) for model in models}
    seen: dict[str, Any] = {}
    version = 0
    for count in (1, 2):
        for transport in TRANSPORTS:
            model, version = models[version % 2], version + 1
            trainer.become(model)
            refitter = trainer.refitter(urls=servers.urls[:count], transport=transport, verify="full", deadline_s=200.0)
            report = refitter.refit(version)
            refitter.close()
            if is_first:
                held = [checksums_by_rank(servers, url) for url in servers.urls[:count]]
                seen[f"{transport}, {count}"] = (held, [expected[model]] * count, report.bytes)
    return seen | {"released": _released(trainer, models[1])}


def _loaded_export(trainer: Trainer, model: str) -> list[dict[str, str]]:
    """Return, on rank 0, the checksums of a server that loaded the trainer's export of a model."""
    from megatron_dypo.models.export import export_hf

    trainer.become(model)
    servers, out_dir = trainer.servers, Path(trainer.servers.run_dir) / f"export-{Path(model).name}"
    export_hf(trainer.params(), trainer.arch, trainer.layout, out_dir=out_dir, reference_hf_path=Path(servers.served))
    if trainer.layout.rank:
        return []
    ask(servers, servers.urls[0], "/update_weights_from_disk", {"model_path": str(out_dir)})
    return checksums_by_rank(servers, servers.urls[0])


def _released(trainer: Trainer, model: str) -> list[dict[str, Any]]:
    """Refit twice, and release memory in between; return, on rank 0, the servers' answers."""
    trainer.become(model)
    refitter = trainer.refitter(transport="auto", offload_servers=True)
    refitter.refit(101)
    refitter.release()
    refitter.release()
    refitter.refit(102)
    refitter.close()
    body = {
        "input_ids": PROMPT,
        "sampling_params": {"max_new_tokens": 4},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    servers = trainer.servers
    return [ask(servers, url, "/generate", body) for url in servers.urls] if trainer.layout.rank == 0 else []


@pytest.fixture(scope="module")
def seen(mesh: str, models: list[Path], servers: Servers) -> dict[str, Any]:
    names = list(map(str, models[1:]))
    return run_ranks(4, rank_refit_all_ways, servers, names, MESHES[mesh], deadline_s=500.0)[0]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_tensor_of_every_rank_is_that_of_a_server_that_loaded_the_export(
    transport: str, count: int, seen: dict[str, Any]
) -> None:
    held, expected, _ = seen[f"{transport}, {count}"]
    assert len(expected[0][0]) > 30
    assert held == expected


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("transport", ["p2p", "local"])
def test_a_planned_refit_sends_each_server_its_own_bytes(
    transport: str, count: int, seen: dict[str, Any], models: list[Path]
) -> None:
    model = import_transformers().AutoModelForCausalLM.from_pretrained(models[1])
    replicated = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    ranks = len(seen[f"{transport}, 1"][1][0])
    whole = 4 * (sum(p.numel() for p in model.parameters()) + (ranks - 1) * replicated)
    sent = seen[f"{transport}, {count}"][2]
    assert count * whole <= sent <= 1.01 * count * whole


def test_rollouts_after_memory_was_released_are_of_the_new_weights(seen: dict[str, Any], models: list[Path]) -> None:
    transformers = import_transformers()
    oracle = transformers.AutoModelForCausalLM.from_pretrained(models[2], attn_implementation="eager").eval()
    assert len(seen["released"]) == 2
    for rollout in seen["released"]:
        meta = rollout["meta_info"]
        assert meta["weight_version"] == "102"
        with torch.no_grad():
            logp_LV = torch.log_softmax(oracle(torch.tensor([PROMPT])).logits[0], -1)
        expected = logp_LV[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0].numpy()
        served = [logp for logp, *_ in meta["input_token_logprobs"][1:]]
        np.testing.assert_allclose(served, expected, atol=1e-5, rtol=0)
