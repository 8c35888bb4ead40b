"""The order of a refit's calls, and the state after a failure of each: one rank, fake servers, the disk transport."""

import contextlib
import dataclasses
import json

import pytest
import torch

from megatron_dypo.models.architecture import load_architecture
from megatron_dypo.models.families.registry import family_rows
from megatron_dypo.models.random_model import write_random_model
from megatron_dypo.refit.control import SGLangControl
from megatron_dypo.refit.deadline import Deadline
from megatron_dypo.refit.lockstep import RefitError
from megatron_dypo.refit.model_checks import check_names
from megatron_dypo.rollout.server.command import WEIGHT_LOADER
from tests.support.fake_control import KEY
from tests.support.refit_setting import HF_CONFIG

GOOD_REFIT = [
    "/pause_generation",
    "/update_weights_from_disk",
    "/update_weight_version",
    "/continue_generation",
]


def test_refit_pauses_loads_names_the_version_and_goes_on(setting):
    report = setting.refitter.refit(3)
    assert all(server.posts == GOOD_REFIT for server in setting.servers)
    assert all(server.version == "3" for server in setting.servers)
    assert report.version == 3
    assert report.bytes == sum(4 * param.numel() for param in setting.params.values())
    assert report.seconds > 0


def test_servers_are_told_to_load_what_the_trainer_holds(setting):
    setting.refitter.refit(1)
    body = dict(setting.servers[0].calls)["/update_weights_from_disk"]
    assert body == {"model_path": str(setting.refit / "version_1"), "flush_cache": True}
    weights = setting.weights_on_disk(1)
    assert torch.equal(weights["model.embed_tokens.weight"], setting.params["embedding.word_embeddings.weight"])
    assert json.loads((setting.refit / "version_1" / "config.json").read_text())["model_type"] == "qwen3"


def test_a_later_refit_sends_the_later_weights_and_removes_the_older_folder(setting):
    setting.refitter.refit(1)
    setting.params["decoder.final_layernorm.weight"].add_(1.0)
    setting.refitter.refit(2)
    assert [path.name for path in setting.refit.iterdir()] == ["version_2"]
    assert torch.equal(
        setting.weights_on_disk(2)["model.norm.weight"], setting.params["decoder.final_layernorm.weight"]
    )


@pytest.mark.parametrize("setting", [{"in_flight": "abort"}], indirect=True)
def test_abort_ends_requests_before_the_scheduler_is_drained(setting):
    setting.refitter.refit(1)
    pauses = [body["mode"] for path, body in setting.servers[0].calls if path == "/pause_generation"]
    assert pauses == ["abort", "retract"]


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/pause_generation", (500, "boom")),
        ("/update_weights_from_disk", (400, {"success": False, "message": "cannot read"})),
        ("/update_weights_from_disk", (200, {"success": False, "message": "partly loaded"})),
        ("/update_weight_version", (400, {"success": False, "message": "no"})),
    ],
)
def test_a_failed_call_names_server_call_and_answer_and_generation_goes_on(setting, path, answer):
    for server in setting.servers:
        server.answers[path] = answer
    with pytest.raises(RefitError, match=f"POST {setting.servers[0].url}{path}: status {answer[0]}"):
        setting.refitter.refit(1)
    assert all(server.posts[-1] == "/continue_generation" for server in setting.servers)


def test_servers_that_may_hold_a_mixture_are_marked_by_no_number(setting):
    for server in setting.servers:
        server.answers["/update_weights_from_disk"] = (400, {"success": False, "message": "cannot read"})
    with pytest.raises(RefitError):
        setting.refitter.refit(4)
    assert [server.version for server in setting.servers] == ["failed-4", "failed-4"]


def test_servers_that_were_not_touched_keep_their_version(setting):
    for server in setting.servers:
        server.answers["/pause_generation"] = (500, "boom")
    with pytest.raises(RefitError):
        setting.refitter.refit(4)
    assert [server.version for server in setting.servers] == ["default", "default"]


def test_a_refit_after_a_failed_one_succeeds(setting):
    for server in setting.servers:
        server.answers["/update_weights_from_disk"] = (400, {"success": False, "message": "cannot read"})
    with pytest.raises(RefitError):
        setting.refitter.refit(4)
    for server in setting.servers:
        server.answers.clear()
    setting.refitter.refit(4)
    assert [server.version for server in setting.servers] == ["4", "4"]
    assert [path.name for path in setting.refit.iterdir()] == ["version_4"]


def test_another_family_is_refused_before_anything_is_sent(setting):
    setting.servers[1].model_type = "llama"
    with pytest.raises(RefitError, match=f"{setting.servers[1].url}: serves model_type='llama'"):
        setting.refitter.refit(1)
    assert not setting.refit.exists()
    assert "/pause_generation" not in setting.servers[0].posts


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"weight_cache_mode": "client"},
            "weight_cache_mode='client': SGLang refuses new weights while its weight cache",
        ),
        ({"speculative_algorithm": "EAGLE"}, "speculative_algorithm='EAGLE': a refit brings no weights to a draft"),
    ],
)
def test_a_running_server_that_no_refit_can_serve_is_refused_before_the_pause(setting, settings, words):
    setting.servers[1].settings = settings
    with pytest.raises(RefitError, match=f"{setting.servers[1].url}: {words}"):
        setting.refitter.refit(1)
    assert all("/pause_generation" not in server.posts for server in setting.servers)


@pytest.mark.parametrize("setting", [{"transport": "p2p"}, {"transport": "local"}], indirect=True)
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"attn_dp_size": 2}, "server attn_dp_size=2: does not divide server tensor=1"),
        ({"tp_size": 4, "ep_size": 2}, "server expert=2: a qwen3 model has no experts"),
        ({"tp_size": 16, "attn_dp_size": 2}, "server tensor / attn_dp_size=8: does not divide num_attention_heads=4"),
        ({"dp_size": 2}, "data_parallel=2: p2p and local need 1"),
        ({"enable_eplb": True}, "enable_eplb=True: the plan of p2p and local knows no experts that move"),
    ],
)
def test_a_server_that_the_plan_does_not_know_is_refused_before_the_pause(setting, settings, words):
    for server in setting.servers:
        server.loaders = (WEIGHT_LOADER,)
    setting.servers[0].settings = settings
    with pytest.raises(RefitError, match=f"{setting.servers[0].url}: {words}"):
        setting.refitter.refit(1)
    assert all("/pause_generation" not in server.posts for server in setting.servers)


def test_replicas_of_attention_are_no_replicas_of_the_server(setting):
    """Before 0.5.23 SGLang reported them as dp_size. A broadcast then has as many ranks as tp_size says."""
    server = setting.servers[0]
    with contextlib.closing(SGLangControl([server.url], KEY)) as control:
        for settings, replicas, copies in (
            ({"dp_size": 2}, 2, 1),
            ({"dp_size": 2, "enable_dp_attention": True}, 1, 2),
            ({"attn_dp_size": 4, "enable_dp_attention": True}, 1, 4),
        ):
            server.settings = settings
            (info,) = control.describe(Deadline(5.0))
            assert (info.data_parallel, info.attention_data) == (replicas, copies)


def test_sglangs_own_update_serves_attention_data_parallelism(setting):
    for server in setting.servers:
        server.settings = {"tp_size": 4, "enable_dp_attention": True, "attn_dp_size": 2}
    setting.refitter.refit(1)
    assert all(server.posts == GOOD_REFIT for server in setting.servers)


@pytest.mark.parametrize("transport", ["auto", "p2p", "broadcast", "disk"])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"moe_dense_tp_size": 1}, "server moe_dense_tp_size=1: must be left out for a qwen3 model: SGLang splits its"),
        ({"attn_dp_size": 3}, "server attn_dp_size=3: does not divide server tensor=2"),
    ],
)
def test_servers_that_compute_the_model_wrongly_are_refused_before_the_pause(setting, settings, words, transport):
    setting.refitter._config = dataclasses.replace(setting.refitter._config, transport=transport)
    for server in setting.servers:
        server.settings = {"tp_size": 2, **settings}
    with pytest.raises(RefitError, match=f"{setting.servers[0].url}: {words}"):
        setting.refitter.refit(1)
    assert all("/pause_generation" not in server.posts for server in setting.servers)


def test_another_size_is_refused_before_anything_is_sent(setting, tmp_path):
    write_random_model(tmp_path / "other", {**HF_CONFIG, "intermediate_size": 32}, seed=0)
    setting.servers[0].model_path = str(tmp_path / "other")
    with pytest.raises(RefitError, match="ffn_hidden_size=32, the policy has 24"):
        setting.refitter.refit(1)


def test_a_parameter_of_the_wrong_shape_is_refused(setting):
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    setting.params[name] = setting.params[name][:-1]
    with pytest.raises(RefitError, match=r"linear_fc2.weight: shape \(15, 24\), the architecture needs \(16, 24\)"):
        setting.refitter.refit(1)


def test_a_missing_parameter_is_refused(setting):
    del setting.params["decoder.final_layernorm.weight"]
    with pytest.raises(RefitError, match=r"model\.norm\.weight is held by no stage"):
        setting.refitter.refit(1)


def test_names_sent_twice_or_unknown_are_refused(setting):
    arch = load_architecture(setting.reference)
    names = [name for row in family_rows(arch) if not row.is_copy for name in row.hf]
    check_names([names[:3], names[3:]], arch)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is sent 2 times"):
        check_names([names, ["model.norm.weight"]], arch)
    with pytest.raises(ValueError, match=r"lm_head\.weight is not of this architecture"):
        check_names([names, ["lm_head.weight"]], arch)
