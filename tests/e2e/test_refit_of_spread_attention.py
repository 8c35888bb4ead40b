"""Refits into real SGLang servers whose ranks attend to requests of their own (attention data parallelism).

Each rank has its part of two copies of attention, and its part of one MLP or of one set of experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dypo.config.rollout import ServersConfig
from megatron_dypo.rollout.server.servers import start_servers
from tests.support.dist.spawn import run_ranks
from tests.support.e2e.refitted_logps import AXES, BODY, TOKENS, logps_of
from tests.support.e2e.refitting_ranks import Running, Servers, Trainer, ask, checksums_by_rank
from tests.support.hf_models import make_hf_model

pytestmark = pytest.mark.slow
IN_FLIGHT = 480
"""Tokens of a request that is under way while a refit begins. The models have 512 positions."""
TRANSPORTS = ("p2p", "local", "broadcast")
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 128, "intermediate_size": 128, "head_dim": 32}
"""Sizes that a CPU does not pad on each of two ranks."""
CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "dense, two servers": ("qwen3", {"intermediate_size": 128, "tie_word_embeddings": True}, ("--attn-dp-size", "2")),
    "experts, old flags": ("qwen3_moe", EXPERTS, ("--enable-dp-attention", "--dp-size", "2", "--enable-dp-lm-head")),
    "latent attention": (
        "moonlight",
        {"moe_intermediate_size": 128, "intermediate_size": 128},
        ("--attn-dp-size=2", "--moe-dense-tp-size", "1"),
    ),
}
"""Kind of model, its sizes, and flags of its servers."""


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def models(case: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    kind, sizes, _ = CASES[case]
    folder = tmp_path_factory.mktemp("models")
    return [make_hf_model(kind, folder / name, seed=seed, **sizes) for seed, name in enumerate("abcd")]


@pytest.fixture(scope="module")
def servers(case: str, models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    flags = CASES[case][2]
    if CASES[case][0] == "moonlight":
        flags += ("--disable-shared-experts-fusion",)
    per_node = 2 if "two servers" in case else 1
    cfg = ServersConfig(port=31000, start_deadline_s=900.0, per_node=per_node, tensor_parallel=2, extra_args=flags)
    with start_servers(cfg, models[0], "float32", tmp_path_factory.mktemp("sglang"), seed=1, device="cpu") as pool:
        assert pool.api_key is not None
        run_dir = tmp_path_factory.mktemp("run")
        yield Servers(urls=pool.urls, api_key=pool.api_key, served=str(models[0]), run_dir=str(run_dir))


def rank_refits(servers: Servers, models: dict[str, str]) -> dict[str, Any]:
    """Refit by each transport while a request runs on each server; return, on rank 0, what each rank of each server
    then holds, what it holds once it has loaded the same model itself, and answers of both copies of attention."""
    from megatron_dypo.parallel.groups import close

    axes = AXES if "num_experts" in Path(servers.served, "config.json").read_text(encoding="utf-8") else {"tensor": 2}
    trainer, seen = Trainer(servers, **axes), {}
    for version, (transport, model) in enumerate(models.items(), start=1):
        trainer.become(model)
        refitter = trainer.refitter(transport=transport, deadline_s=200.0)
        running = (
            [Running(servers, url, IN_FLIGHT) for url in servers.urls for _ in "12"] if trainer.layout.rank == 0 else []
        )
        refitter.refit(version)
        refitter.close()
        if trainer.layout.rank == 0:
            held = [checksums_by_rank(servers, url) for url in servers.urls]
            with ThreadPoolExecutor(4) as threads:
                asked = [threads.submit(ask, servers, url, "/generate", BODY) for url in servers.urls for _ in "1234"]
                answers = [one.result()["meta_info"] for one in asked]
            versions = [one.meta()["weight_version"] for one in running]
            for url in servers.urls:
                ask(servers, url, "/update_weights_from_disk", {"model_path": model})
            loaded = [checksums_by_rank(servers, url) for url in servers.urls]
            seen[transport] = {"held": held, "loaded": loaded, "answers": answers, "versions": versions}
    close(trainer.layout)
    return seen


@pytest.fixture(scope="module")
def seen(servers: Servers, models: list[Path]) -> dict[str, Any]:
    named = {transport: str(model) for transport, model in zip(TRANSPORTS, models[1:], strict=True)}
    return run_ranks(2, rank_refits, servers, named, deadline_s=500.0)[0]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_rank_holds_what_it_would_load_itself(transport: str, seen: dict[str, Any]) -> None:
    assert len(seen[transport]["held"][0][0]) > 30
    assert seen[transport]["held"] == seen[transport]["loaded"]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_copy_of_attention_samples_from_what_was_refitted(
    transport: str, seen: dict[str, Any], models: list[Path]
) -> None:
    model, version = models[1 + TRANSPORTS.index(transport)], str(1 + TRANSPORTS.index(transport))
    answers = seen[transport]["answers"]
    assert {meta["dp_rank"] for meta in answers} == {0, 1}
    for meta in answers:
        assert meta["weight_version"] == version
        new = [entry[1] for entry in meta["output_token_logprobs"]]
        served = [entry[0] for entry in (*meta["input_token_logprobs"][1:], *meta["output_token_logprobs"])]
        np.testing.assert_allclose(served, logps_of(model, [*TOKENS, *new]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_requests_of_every_copy_go_on_with_the_new_weights(transport: str, seen: dict[str, Any]) -> None:
    assert set(seen[transport]["versions"]) == {str(1 + TRANSPORTS.index(transport))}
