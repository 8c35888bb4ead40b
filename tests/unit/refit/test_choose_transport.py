"""The transport that a run gets, and the message about it."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_dypo.config.refit import RefitConfig
from megatron_dypo.config.server_flags import settings_of
from megatron_dypo.refit.answers import ServerError, ServerInfo
from megatron_dypo.refit.transports.connect import choose, is_here
from megatron_dypo.rollout.server.command import WEIGHT_LOADER
from tests.support.architectures import make_arch

HERE = ServerInfo(
    url="http://127.0.0.1:1",
    sglang="0.5.23",
    model_path="m",
    model_type="qwen3",
    weight_version="0",
    tensor_parallel=2,
    pipeline_parallel=1,
    data_parallel=1,
    expert_parallel=1,
    custom_loaders=(WEIGHT_LOADER,),
)
ARCH = make_arch("qwen3", num_attention_heads=8, num_key_value_heads=4, ffn_hidden_size=96)
BRIDGED = dataclasses.replace(ARCH, family="gemma3_text")
AWAY = dataclasses.replace(HERE, url="http://192.0.2.1:1")
STOCK = dataclasses.replace(HERE, url="http://127.0.0.1:2", custom_loaders=())
OLD = dataclasses.replace(HERE, url="http://127.0.0.1:3", sglang="0.5.12.post1")
STAGED = dataclasses.replace(HERE, pipeline_parallel=2)
SPREAD = dataclasses.replace(HERE, attention_data=2)
UNEVEN = dataclasses.replace(HERE, attention_data=4)
TOO_MANY = dataclasses.replace(HERE, tensor_parallel=16, attention_data=1)
MOVING = dataclasses.replace(HERE, settings=settings_of({"ep_num_redundant_experts": 4}))


@pytest.mark.parametrize(
    ("infos", "one_host", "kind", "reason"),
    [
        ([HERE, HERE], True, "local", "share this host"),
        ([HERE, AWAY], True, "p2p", "not local: http://192.0.2.1:1 is on another host"),
        ([HERE], False, "p2p", "not local: the trainer's ranks are on several hosts"),
        ([HERE, STOCK], True, "broadcast", "not p2p: http://127.0.0.1:2: custom_weight_loader=[]"),
        (
            [HERE, OLD],
            True,
            "broadcast",
            "http://127.0.0.1:3: SGLang 0.5.12.post1: p2p and local need 0.5.22",
        ),
        ([STAGED], True, "broadcast", "pipeline_parallel=2"),
        ([HERE, SPREAD], True, "local", "share this host"),
        ([UNEVEN], True, "broadcast", "http://127.0.0.1:1: server attn_dp_size=4: does not divide server tensor=2"),
        ([TOO_MANY], True, "broadcast", "http://127.0.0.1:1: server tensor=16: does not divide num_attention_heads=8"),
        ([HERE, MOVING], True, "broadcast", "ep_num_redundant_experts=4: "),
    ],
)
def test_auto_takes_the_best_that_all_servers_support_and_says_why(infos, one_host, kind, reason):
    chosen, why = choose(RefitConfig(), infos, one_host, ARCH)
    assert chosen == kind
    assert reason in why


@pytest.mark.parametrize(
    ("requested", "infos", "one_host", "reason"),
    [
        ("p2p", [STOCK], True, f"start the server with --custom-weight-loader {WEIGHT_LOADER}"),
        ("local", [AWAY], True, "is on another host"),
        ("local", [OLD], True, "need 0.5.22 or newer, .*; use refit.transport=broadcast or disk"),
        ("p2p", [OLD], True, "need 0.5.22 or newer, .*; use refit.transport=broadcast or disk"),
        ("local", [HERE], False, "on several hosts"),
    ],
)
def test_a_transport_that_was_asked_for_and_cannot_work_is_an_error_that_says_why(requested, infos, one_host, reason):
    with pytest.raises(ServerError, match=f"refit.transport={requested}: .*{reason}") as error:
        choose(RefitConfig(transport=requested), infos, one_host, ARCH)
    assert error.value.urls == ()


def test_a_model_without_a_name_table_is_broadcast_although_all_servers_could_take_a_plan():
    chosen, why = choose(RefitConfig(), [HERE, HERE], True, BRIDGED)
    assert chosen == "broadcast"
    assert why.startswith("not local: the model has no name table (model.family=bridge); not p2p: the model has no")
    for requested in ("p2p", "local"):
        with pytest.raises(ServerError, match=f"refit.transport={requested}: the model has no name table"):
            choose(RefitConfig(transport=requested), [HERE], True, BRIDGED)


def test_quantised_weights_are_not_broadcast():
    with pytest.raises(ServerError, match=r"not broadcast: it does not quantise"):
        choose(RefitConfig(quantize="fp8_block"), [STOCK], True, ARCH)


def test_a_server_is_here_if_its_address_is():
    assert is_here("http://localhost:1")
    assert not is_here("http://192.0.2.1:1")
