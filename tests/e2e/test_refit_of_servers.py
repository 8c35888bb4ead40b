"""Refits from TP2 × PP2 gloo ranks into two real SGLang servers of a tied Qwen3."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.support.dist.spawn import run_ranks
from tests.support.e2e.refitting_ranks import (
    HANG_DEADLINE_S,
    IN_FLIGHT_TOKENS,
    PROMPT,
    VERSIONS,
    Servers,
    ask,
    checksums,
    rank_refit,
    rank_refit_while_a_server_dies,
    rank_refit_while_a_server_hangs,
)
from tests.support.hf_models import import_transformers, make_hf_model

# Each stage has about 1.7 MiB, and so sends several buckets of 1 MiB.
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "vocab_size": 1031,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [make_hf_model("qwen3", folder / name, seed=seed, **SIZES) for seed, name in enumerate("abc")]


@pytest.fixture(scope="module")
def servers(models, sglang_servers, tmp_path_factory):
    pool = sglang_servers(models[0], per_node=2)
    run_dir = tmp_path_factory.mktemp("run")
    return Servers(urls=pool.urls, api_key=pool.api_key, served=str(models[0]), run_dir=str(run_dir))


@pytest.fixture(scope="module")
def loaded(models, servers):
    """Return the checksums of a server that loaded each model itself."""
    sums = []
    for model in (*models[1:], models[0]):
        ask(servers, servers.urls[0], "/update_weights_from_disk", {"model_path": str(model)})
        sums.append(checksums(servers, servers.urls[0]))
    return dict(zip(("b", "c", "a"), sums, strict=True))


@pytest.fixture(scope="module")
def seen(models, servers, loaded):
    return run_ranks(4, rank_refit, servers, str(models[1]), str(models[2]))[0]


@pytest.fixture(scope="module")
def rollouts(seen, servers):
    """Return new rollouts of each server after the last refit of model b."""
    sampling = {"temperature": 1.0, "max_new_tokens": 32, "ignore_eos": True}
    body = {"input_ids": [PROMPT, PROMPT[:5]], "sampling_params": sampling, "return_logprob": True}
    return [rollout for url in servers.urls for rollout in ask(servers, url, "/generate", body)]


@pytest.mark.parametrize(("transport", "model"), [("broadcast", "b"), ("disk", "c")])
def test_every_parameter_of_every_server_is_that_of_a_fresh_load(seen, loaded, transport, model):
    assert loaded[model] != loaded["a"]
    assert seen[f"{transport} checksums"] == [loaded[model], loaded[model]]


@pytest.mark.parametrize("transport", ["broadcast", "disk"])
def test_the_version_moves_on_every_server(seen, transport):
    assert [info["weight_version"] for info in seen[f"{transport} info"]] == [str(VERSIONS[transport])] * 2


@pytest.mark.parametrize("transport", ["broadcast", "disk"])
def test_the_report_counts_each_tensor_once(seen, models, transport):
    transformers = import_transformers()
    model = transformers.AutoModelForCausalLM.from_pretrained(models[1])
    assert seen[transport].bytes == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert seen[transport].version == VERSIONS[transport]


def test_fresh_rollouts_are_of_the_new_weights_and_say_so(rollouts, models):
    transformers = import_transformers()
    model = transformers.AutoModelForCausalLM.from_pretrained(models[1], attn_implementation="eager").eval()
    for prompt, rollout in zip([PROMPT, PROMPT[:5]] * 2, rollouts, strict=True):
        assert rollout["meta_info"]["weight_version"] == str(VERSIONS["abort"])
        tokens = prompt + rollout["output_ids"]
        with torch.no_grad():
            logp = torch.log_softmax(model(torch.tensor([tokens])).logits[0], -1)
        ours = [float(logp[len(prompt) + i - 1, token]) for i, token in enumerate(rollout["output_ids"])]
        theirs = [entry[0] for entry in rollout["meta_info"]["output_token_logprobs"]]
        np.testing.assert_allclose(theirs, ours, atol=1e-4)


def test_paused_requests_end_whole_and_tell_both_versions(seen):
    assert len(seen["pause"]) == 2
    for meta in seen["pause"]:
        assert meta["finish_reason"]["type"] == "length"
        assert meta["completion_tokens"] == IN_FLIGHT_TOKENS
        versions = [span["version"] for span in meta["weight_versions"]]
        assert versions == [str(VERSIONS["disk"]), str(VERSIONS["pause"])]


def test_aborted_requests_end_at_once(seen):
    assert len(seen["abort"]) == 2
    for meta in seen["abort"]:
        assert meta["finish_reason"]["type"] == "abort"
        assert meta["completion_tokens"] < IN_FLIGHT_TOKENS


@pytest.fixture(scope="module")
def hung(rollouts, models, servers):
    return run_ranks(4, rank_refit_while_a_server_hangs, servers, str(models[2]))


def test_a_server_that_hangs_in_a_refit_costs_half_of_its_deadline_and_is_fenced(hung, servers):
    for outcome in hung:
        assert outcome["serving"][0] == servers.urls[:1]
        report = outcome["reports"][0]
        assert (report.fenced, report.retries) == (1, 1)
        assert HANG_DEADLINE_S / 2 <= report.seconds < HANG_DEADLINE_S


def test_a_server_that_woke_up_rejoins_by_a_full_refit_without_its_old_requests(hung, servers, loaded):
    for outcome in hung:
        assert outcome["serving"][1] == servers.urls
        assert (outcome["reports"][1].rejoined, outcome["reports"][1].retries) == (1, 0)
    first = hung[0]
    assert first["versions"] == [str(VERSIONS["hung"] + 2)] * 2
    assert first["checksums"] == [loaded["c"]] * 2
    assert first["in flight"]["finish_reason"]["type"] == "abort"


@pytest.mark.slow
def test_a_server_killed_in_a_refit_is_fenced_and_the_rest_gets_the_weights(hung, models, servers, loaded):
    """This test is the last one: it kills a server."""
    outcomes = run_ranks(4, rank_refit_while_a_server_dies, servers, str(models[2]))
    for outcome in outcomes:
        assert outcome["serving"] == servers.urls[:1]
        assert (outcome["report"].fenced, outcome["report"].retries) == (1, 1)
    first = outcomes[0]
    assert first["version"] == str(VERSIONS["resumed"] + 1)
    assert first["checksums"] == loaded["c"]
    assert first["in flight"]["finish_reason"]["type"] == "length"
    versions = [span["version"] for span in first["in flight"]["weight_versions"]]
    assert versions == [str(VERSIONS["resumed"]), str(VERSIONS["resumed"] + 1)]
