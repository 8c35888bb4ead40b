"""Rules of rollout and refit settings: an impossible value is refused with field, value and rule."""

from __future__ import annotations

import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dypo.config.reading.load import parse_config
from megatron_dypo.config.refit import RefitConfig
from megatron_dypo.config.rollout import RolloutConfig, ServersConfig
from megatron_dypo.config.server_flags import ROUTES_FLAG, ROUTES_SETTING, SETTINGS
from megatron_dypo.config.tree import Config
from megatron_dypo.config.unsafe_flags import UNSAFE_FLAGS

REQUIRED = {"model": {"hf_path": "m"}, "data": {"prompts": ["p.jsonl"]}}


def servers(**fields: Any) -> dict[str, Any]:
    return {**REQUIRED, "rollout": {"servers": fields}}


@pytest.mark.parametrize(
    "url",
    [
        "foo",
        "foo:30000",
        "10.0.0.1:30000",
        "",
        "http://",
        "http:///x",
        "//h:1",
        "ftp://h:1",
        "http://h:70000",
        "http://h:0",
        "http://h:",
        "http://h:x",
        "http://h:-1",
        "http://:30000",
        "http://h:1/path",
        "http://h:1/generate",
        "http://h:1?x=1",
        "http://h:1/?",
        "http://h:1#f",
        "http://h h:1",
        " http://h:1",
        "http://h:1\n",
        "http://h..x:1",
        "http://1.2.3:1",
        "http://1.2.3.999:1",
        "http://[::1:1",
        "http://[::g]:1",
        "http://ä:1",
        "http://h,i:1",
    ],
)
def test_a_url_that_is_no_place_to_listen_is_refused_by_name(url: str) -> None:
    with pytest.raises(ValueError, match=r"c\.yaml: rollout\.servers\.urls=.*: must be http://HOST:PORT") as caught:
        parse_config(servers(urls=[url]), where="c.yaml")
    assert repr(url) in str(caught.value)


@pytest.mark.parametrize("url", ["http://u:p4ssword@h", "http://p4ssword@h:1", "http://u:p4ssword@h:1/x"])
def test_a_url_with_a_password_is_refused_and_the_password_not_shown(url: str) -> None:
    with pytest.raises(ValueError, match=r"urls='http://\*\*\*@h.*api_key_env") as caught:
        ServersConfig(urls=(url,))
    assert "p4ssword" not in str(caught.value)


@pytest.mark.parametrize(
    "urls",
    [
        ["http://a:1"],
        ["https://a.example.org"],
        ["http://10.0.0.1:30000/", "http://[fd00::1]:30000"],
        ["http://node_1:1", "http://node-1:1", "http://node_1:2"],
    ],
)
def test_a_url_may_be_any_host_and_port(urls: list[str]) -> None:
    assert parse_config(servers(urls=urls), where="c").rollout.servers.urls == tuple(urls)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("http://a:1", "http://a:1"),
        ("http://a:1", "http://a:1/"),
        ("http://a:1", "http://A:1"),
        ("http://a", "http://a:80"),
        ("https://a:443", "https://a"),
        ("http://a:1", "http://a.:1"),
    ],
)
def test_a_server_is_named_once(first: str, second: str) -> None:
    with pytest.raises(ValueError, match=r"urls=.*is given twice: 'http.*' is the same server"):
        ServersConfig(urls=("http://b:1", first, second))


def test_a_router_is_a_place_too_and_none_of_its_servers() -> None:
    with pytest.raises(ValueError, match="router='r:1': must be http"):
        ServersConfig(urls=("http://a:1",), router="r:1")
    with pytest.raises(ValueError, match="router='http://a:1/': is given twice"):
        ServersConfig(urls=("http://a:1",), router="http://a:1/")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"port": 70000}, "port=70000: must be from 1 to 65535"),
        ({"port": 0}, "port=0: must be from 1 to 65535"),
        ({"port": 65530, "per_node": 8}, "port=65530: must be from 1 to 65528: each of 8 servers takes a port"),
        ({"mem_fraction": 7}, "mem_fraction=7.0: must be between 0 and 1"),
        ({"mem_fraction": 1}, "mem_fraction=1.0: must be between 0 and 1"),
        ({"mem_fraction": 0}, "mem_fraction=0.0: must be between 0 and 1"),
        ({"mem_fraction": math.nan}, "mem_fraction=nan: must be between 0 and 1"),
        ({"max_total_tokens": 0}, "max_total_tokens=0: must be positive"),
        ({"base_gpu": -1}, "base_gpu=-1: must not be negative"),
        ({"tensor_parallel": 0}, "tensor_parallel=0: must be positive"),
        ({"per_node": 0}, "per_node=0: must be positive"),
        ({"nodes": 0}, "nodes=0: must be positive"),
        ({"max_restarts": -1}, "max_restarts=-1: must not be negative"),
        ({"start_deadline_s": math.inf}, "start_deadline_s=inf: must be above 0 and at most 1e"),
        ({"stop_grace_s": math.nan}, "stop_grace_s=nan: must be above 0"),
        ({"host": ""}, "host='': must be a host name"),
        ({"host": "http://h"}, "host='http://h': must be a host name"),
        ({"host": "h:1"}, "host='h:1': must be a host name"),
        ({"python": ""}, "python='': must be a path, or null"),
        ({"api_key_env": "sk-secret"}, "api_key_env: must be the name of an environment variable"),
    ],
)
def test_a_setting_of_servers_out_of_its_range_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r"rollout\.servers") as caught:
        parse_config(servers(**fields), where="c.yaml")
    assert f"c.yaml: rollout.servers.{words}" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "advice"),
    [
        ("--port", r"use rollout\.servers\.port"),
        ("--port=31000", r"use rollout\.servers\.port"),
        ("--port 31000", r"use rollout\.servers\.port"),
        ("--host", r"use rollout\.servers\.host"),
        ("--model-path", r"use model\.hf_path"),
        ("--model", r"use model\.hf_path"),
        ("--api-key", r"the environment variable that rollout\.servers\.api_key_env names"),
        ("--api-key=s3cret", r"the environment variable that rollout\.servers\.api_key_env names"),
        ("--api-k", r"the environment variable"),
        ("--tp-size", r"use rollout\.servers\.tensor_parallel"),
        ("--tp", r"use rollout\.servers\.tensor_parallel"),
        ("--tensor-parallel-size", r"use rollout\.servers\.tensor_parallel"),
        ("--random-seed", r"use run\.seed"),
        ("--dtype", r"use model\.dtype"),
        ("--mem-fraction-static", r"use rollout\.servers\.mem_fraction"),
        ("--max-total-tokens", r"use rollout\.servers\.max_total_tokens"),
        ("--base-gpu-id", r"use rollout\.servers\.base_gpu"),
        ("--config", "leave it out"),
        ("--custom-weight-loader", "leave it out"),
        ("--skip-tokenizer-init", "leave it out"),
        ("--weight-version", "leave it out"),
    ],
)
def test_a_flag_that_the_run_sets_is_refused_with_the_key_to_use(argument: str, advice: str) -> None:
    with pytest.raises(ValueError, match=rf"extra_args='--[a-z-]+': .*{advice}") as caught:
        ServersConfig(extra_args=("--enable-metrics", argument, "x"))
    assert "s3cret" not in str(caught.value)


UNSAFE = [
    (("--admin-api-key", "s3cret"), "ps` and config.yaml would show it"),
    (("--admin-api-key=s3cret",), r"rollout\.servers\.api_key_env"),
    (("--admin s3cret",), "would show it"),
    (("--ssl-keyfile-password", "s3cret"), "would show it"),
    (("--grpc-mode",), "asks for no key"),
    (("--smg-grpc",), "asks for no key"),
    (("--grpc-port=50051",), "asks for no key"),
    (("--kv-events-config", '{"publisher":"zmq","endpoint":"tcp://*:5557"}'), "asks for no key"),
    (("--kv-events",), "asks for no key"),
    (("--load-publish-endpoint=tcp://*:5558",), "asks for no key"),
    (("--gated-launch-port", "9"), "asks for no key"),
    (("--tokenizer-worker-num", "4"), r"rollout\.servers\.per_node"),
    (("--enable-http2",), "WebSockets"),
    (("--disaggregation-mode", "prefill"), "asks for no key"),
    (("--trust-remote-code",), "code of the model folder"),
    (("--trust-rem",), "code of the model folder"),
]


@pytest.mark.parametrize(("arguments", "reason"), UNSAFE)
def test_a_flag_that_shows_a_secret_or_opens_a_socket_is_refused_with_the_reason(
    arguments: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        ServersConfig(extra_args=("--enable-metrics", *arguments))
    assert "s3cret" not in str(caught.value)


def test_flags_that_are_the_beginning_of_a_refused_one_may_be_set() -> None:
    ServersConfig(extra_args=("--ssl-keyfile", "key.pem", "--ep", "2", "--enable-metrics"))


@pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="SGLang is not installed")
def test_every_flag_of_sglang_that_names_a_port_or_an_endpoint_is_known() -> None:
    """A new SGLang may have new sockets."""
    code = """
import argparse
import megatron_dypo.rollout.server.sglang_cpu
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
print(*(name for action in parser._actions for name in action.option_strings))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    words = re.compile(r"-(port|endpoints?|password|api-key)$|grpc-mode$")
    found = {flag for flag in done.stdout.split() if words.search(flag)}
    assert len(found) > 12
    harmless = {
        "--port",  # the run's own
        "--api-key",
        "--nccl-port",  # of the server's own ranks: docs/security.md
        "--otlp-traces-endpoint",  # the server connects to it
        "--remote-instance-weight-loader-seed-instance-service-port",
    }
    assert found - harmless <= set(UNSAFE_FLAGS)


UNSERVED = [
    (("--weight-cache-mode", "client"), "--weight-cache-mode client", "SGLang refuses new weights while"),
    (("--weight-cache-m=daemon",), "--weight-cache-m daemon", "SGLang refuses new weights while"),
    (("--speculative-algorithm", "EAGLE3"), "--speculative-algorithm EAGLE3", "brings no weights to a draft model"),
    (("--speculative-draft-model", "d"), "--speculative-draft-model d", "brings no weights to a draft model"),
]
UNPLANNED = [
    (("--moe-dp-size", "2"), "--moe-dp-size 2"),
    (("--attn-cp-size=2",), "--attn-cp-size 2"),
    (("--moe-a2a-backend", "megamoe"), "--moe-a2a-backend megamoe"),
    (("--enable-eplb", "--context-length", "9"), "--enable-eplb"),
    (("--ep-num-redundant-experts=32",), "--ep-num-redundant-experts 32"),
    (("--init-expert-location", "experts.json"), "--init-expert-location experts.json"),
    (("--elastic-ep-backend", "mooncake"), "--elastic-ep-backend mooncake"),
]


def config_with(arguments: tuple[str, ...], transport: str) -> Config:
    refit, servers = {"transport": transport}, {"servers": {"extra_args": list(arguments)}}
    return parse_config(
        {"model": {"hf_path": "m"}, "data": {"prompts": ["p"]}, "refit": refit, "rollout": servers}, where="here"
    )


@pytest.mark.parametrize("transport", ["auto", "p2p", "local", "broadcast", "disk"])
@pytest.mark.parametrize(("arguments", "shown", "reason"), UNSERVED)
def test_servers_that_no_refit_can_serve_are_refused(
    arguments: tuple[str, ...], shown: str, reason: str, transport: str
) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        config_with(arguments, transport)
    assert str(caught.value).startswith(f"here: rollout.servers.extra_args='{shown}': refits cannot serve it: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("arguments", "shown"), UNPLANNED)
def test_servers_that_the_plan_does_not_know_are_refused_for_planned_transports_alone(
    arguments: tuple[str, ...], shown: str
) -> None:
    for transport in ("p2p", "local"):
        with pytest.raises(ValueError, match=r"use refit\.transport=broadcast or disk$") as caught:
            config_with(arguments, transport)
        assert f"rollout.servers.extra_args='{shown}': refits cannot serve it: the plan of p2p and local knows" in str(
            caught.value
        )
    for transport in ("auto", "broadcast", "disk"):
        config_with(arguments, transport)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--weight-cache-mode", "off"),
        ("--speculative-algorithm", "NGRAM"),
        ("--attn-cp-size=1", "--ep-num-redundant-experts", "0"),
        ("--attn-dp-size", "4", "--moe-dense-tp-size", "1", "--enable-dp-lm-head"),
        ("--dp-size", "4", "--enable-dp-attention"),
        ("--moe-a2a-backend", "deepep"),
        ("--ep", "4"),
        ("--init-expert-location", "trivial"),
    ],
)
def test_values_that_change_nothing_or_that_the_plan_knows_are_accepted(arguments: tuple[str, ...]) -> None:
    config_with(arguments, "p2p")


def test_every_flag_and_setting_is_one_of_sglangs() -> None:
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    fields = Path(spec.submodule_search_locations[0]) / "srt/arg_groups/fields"
    source = "\n".join(path.read_text(encoding="utf-8") for path in fields.glob("*.py"))
    for setting in SETTINGS:
        assert re.search(rf"^    {setting.name}: ", source, re.MULTILINE), setting.name
        assert setting.flags[0].removeprefix("--").replace("-", "_") == setting.name
    assert re.search(rf"^    {ROUTES_SETTING}: ", source, re.MULTILINE)
    assert ROUTES_FLAG.removeprefix("--").replace("-", "_") == ROUTES_SETTING


def config_of(**sections: dict[str, Any]) -> Config:
    return parse_config({**REQUIRED, **sections}, where="test")


@pytest.mark.parametrize("extra", [[], [ROUTES_FLAG], ["--enable-memory-saver"]])
def test_servers_return_experts_where_the_trainer_takes_them(extra: list[str]) -> None:
    servers = {"servers": {"extra_args": extra}}
    config = config_of(rollout=servers, objective={"replay": "rollout"})
    assert config.servers.extra_args.count(ROUTES_FLAG) == 1
    assert set(config.servers.extra_args) == {*extra, ROUTES_FLAG}
    for replay in ("off", "trainer"):
        assert list(config_of(rollout=servers, objective={"replay": replay}).servers.extra_args) == extra


def test_the_pass_that_chooses_experts_must_be_the_trainers() -> None:
    rule = "objective.replay=trainer: needs old_logp.source=trainer, whose pass chooses the experts"
    with pytest.raises(ValueError, match=re.escape(rule)):
        config_of(objective={"replay": "trainer"}, old_logp={"source": "server"})
    assert config_of(objective={"replay": "rollout"}, old_logp={"source": "server"}).objective.replay == "rollout"


def test_a_router_that_drops_the_request_for_experts_is_refused() -> None:
    servers = {"servers": {"urls": ["http://a:1"], "router": "http://b:2"}}
    assert config_of(rollout=servers).rollout.servers.router
    with pytest.raises(ValueError, match=r"objective\.replay=rollout: needs rollout\.servers\.router=null"):
        config_of(rollout=servers, objective={"replay": "rollout"})


def test_other_flags_are_the_users() -> None:
    extra = ("--ep-size", "2", "--enable-memory-saver", "--context-length=4096", "--log-level-http", "info", "-1")
    assert ServersConfig(extra_args=extra).extra_args == extra


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"top_k": 0}, "top_k=0: must be at least 1, or -1"),
        ({"top_k": -2}, "top_k=-2: must be at least 1, or -1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": math.nan}, "top_p=nan"),
        ({"temperature": math.inf}, "temperature=inf: must be positive and finite"),
        ({"temperature": math.nan}, "temperature=nan: must be positive"),
        ({"oversample": math.inf}, "oversample=inf: must be at least 1, and finite"),
        ({"oversample": math.nan}, "oversample=nan"),
        ({"request_deadline_s": math.inf}, "request_deadline_s=inf: must be above 0 and at most"),
        ({"request_deadline_s": 0.0}, "request_deadline_s=0.0: must be above 0"),
        ({"max_in_flight": 0}, "max_in_flight=0: must be positive"),
        ({"retries": -1}, "retries=-1: must not be negative"),
    ],
)
def test_a_setting_of_rollouts_out_of_its_range_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="must") as caught:
        RolloutConfig(**fields)
    assert words in str(caught.value)


@pytest.mark.parametrize("fields", [{"deadline_s": math.inf}, {"deadline_s": math.nan}, {"bucket_mib": 0}])
def test_a_setting_of_pushes_out_of_its_range_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(fields))}=.*must be"):
        RefitConfig(**fields)


def test_the_key_that_meant_two_things_is_unknown_and_both_new_ones_are_named() -> None:
    words = r"rollout\.servers\.count: unknown key; did you mean rollout\.servers\.per_node .*rollout\.servers\.nodes"
    with pytest.raises(ValueError, match=words):
        parse_config(servers(count=4), where="c.yaml")


@pytest.mark.parametrize(
    ("fields", "gpus_per_node", "number"),
    [
        ({}, 8, 1),
        ({"per_node": 8}, 8, 8),
        ({"nodes": 4}, 8, 4),
        ({"nodes": 4, "per_node": 2}, 8, 8),
        ({"nodes": 4, "tensor_parallel": 16}, 8, 2),
        ({"tensor_parallel": 16}, 8, 1),
        ({"nodes": 4, "tensor_parallel": 2}, 2, 4),
        ({"nodes": 4, "urls": ("http://a:1", "http://b:1")}, 8, 2),
    ],
)
def test_the_servers_of_a_run_are_its_urls_or_nodes_by_servers_of_a_node(
    fields: dict[str, Any], gpus_per_node: int, number: int
) -> None:
    assert ServersConfig(**fields).num_servers(gpus_per_node) == number


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(
    st.text(max_size=20) | st.builds("http://{}:{}{}".format, st.text(max_size=8), st.integers(), st.text(max_size=4))
)
def test_any_text_is_a_url_or_refused_by_name(text: str) -> None:
    try:
        ServersConfig(urls=(text,))
    except ValueError as error:
        assert str(error).startswith("urls=")  # noqa: PT017
