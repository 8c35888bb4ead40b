"""No proxy of the environment is used between two processes of a run."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest

from megatron_dypo.rollout.proxies import direct_hosts
from megatron_dypo.rollout.server.command import server_environment
from megatron_dypo.rollout.server.probe import http_status, request_json
from tests.support.fake_sglang import FakeSGLang
from tests.support.rollout.clients import closed_url

requests = pytest.importorskip("requests", reason="SGLang warms up with it")
PROXY = {"http_proxy": "http://proxy:3128", "HTTP_PROXY": "http://proxy:3128"}


def environment(host: str, **inherited: str) -> dict[str, str]:
    return server_environment({**PROXY, **inherited}, 1, "gpu", [0], Path("/run/python_path"), host=host)


@pytest.mark.parametrize("inherited", [{}, {"no_proxy": "corp"}, {"NO_PROXY": "corp, other"}, {"no_proxy": "*"}])
@pytest.mark.parametrize("host", ["127.0.0.1", "10.1.2.3", "node7", "fd00::7", "0.0.0.0"])
def test_a_server_reaches_itself_without_a_proxy(
    host: str, inherited: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test uses the two libraries of the server's warm-up and tools."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment(host, **inherited).items():
        monkeypatch.setenv(name, value)
    for reached in {host, "127.0.0.1", "localhost"}:
        url = f"http://{f'[{reached}]' if ':' in reached else reached}:30000/model_info"
        assert requests.utils.get_environ_proxies(url) == {}
        assert urllib.request.proxy_bypass(reached)


def test_what_was_excepted_before_still_is_under_either_name() -> None:
    env = environment("node7", no_proxy="a.corp", NO_PROXY="b.corp,a.corp")
    assert env["no_proxy"] == env["NO_PROXY"] == "a.corp,b.corp,node7,127.0.0.1,localhost,::1"


def test_no_proxy_at_all_stays_so() -> None:
    assert direct_hosts({"no_proxy": "*"}, ["node7"]) == {"no_proxy": "*", "NO_PROXY": "*"}


def test_a_server_keeps_its_proxy_for_other_places() -> None:
    assert environment("node7")["http_proxy"] == "http://proxy:3128"


def test_questions_to_a_server_go_through_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", closed_url())
    with FakeSGLang() as fake:
        assert http_status(f"{fake.url}/health", None) == 200
        assert request_json("GET", f"{fake.url}/server_info", None) == (200, {"tp_size": 1})
