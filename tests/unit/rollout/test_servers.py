"""Servers stop with the run, in whatever way it ends. Real processes take the place of the servers."""

from __future__ import annotations

import functools
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_dypo.config.rollout import ServersConfig
from megatron_dypo.rollout.server import servers
from megatron_dypo.rollout.server.probe import http_status
from megatron_dypo.rollout.server.process import ServerDiedError, ServerProcess
from megatron_dypo.rollout.server.servers import ServerPool, start_servers
from tests.support import fake_sglang
from tests.support.fake_sglang import FakeSGLang, wait_until
from tests.support.rollout.fake_pools import start_pool

PROGRAM = Path(__file__).parents[2] / "support/fake_server_program.py"


@pytest.fixture
def python(tmp_path: Path) -> str:
    """Write an interpreter that runs the fake program in place of any script; its path marks its processes."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {PROGRAM} "$@" --mark {tmp_path}\n')
    path.chmod(0o755)
    return str(path)


def alive(tmp_path: Path) -> list[psutil.Process]:
    """Return the live processes of servers that a test started, without zombies that init has yet to reap."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        arguments = process.info["cmdline"] or []
        if process.info["status"] != psutil.STATUS_ZOMBIE and str(tmp_path) in arguments:
            found.append(process)
    return found


def test_servers_start_at_ports_of_their_own_and_stop_at_the_end(python: str, tmp_path: Path) -> None:
    with start_pool(python, tmp_path, per_node=2) as pool:
        assert len(set(pool.urls)) == 2
        assert pool.api_key is not None
        assert len(pool.api_key) == 32
        assert len(alive(tmp_path)) >= 2
        pool.check()
    assert alive(tmp_path) == []


def test_the_key_is_neither_in_arguments_nor_readable_in_files(python: str, tmp_path: Path) -> None:
    with start_pool(python, tmp_path) as pool:
        assert pool.api_key is not None
        assert not any(pool.api_key in " ".join(process.cmdline()) for process in alive(tmp_path))
        log = tmp_path / "logs/sglang_0.log"
        assert log.read_text().startswith(f"server_args={{'api_key': '{'*' * 32}'}}")
        assert stat.S_IMODE(log.stat().st_mode) == 0o600
        assert [path.name for path in log.parent.iterdir() if path.is_file()] == ["sglang_0.log"]


def test_sockets_and_store_of_a_server_are_this_users_alone(python: str, tmp_path: Path) -> None:
    with start_pool(python, tmp_path):
        server = alive(tmp_path)[-1]
        store = server.environ()["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"]
        folder = Path(store.removeprefix("file://")).parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert "Umask:\t0077" in Path(f"/proc/{server.pid}/status").read_text().splitlines()
    assert not folder.exists()


def test_a_key_of_the_environment_is_used(python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYPO_SGLANG_API_KEY", "mine")
    with start_pool(python, tmp_path) as pool:
        assert pool.api_key == "mine"


def test_a_server_that_dies_while_it_starts_is_named_with_its_last_words(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SERVER", "dies")
    monkeypatch.setenv("DYPO_SGLANG_API_KEY", "mine")
    words = r"(?s)SGLang server 0 .*ended with status 3.*sglang_0\.log.*'api_key': '\*\*\*\*'.*out of luck"
    with pytest.raises(ServerDiedError, match=words):
        start_pool(python, tmp_path)
    assert alive(tmp_path) == []
    assert not list((tmp_path / "logs").glob("*.yaml"))


def test_servers_that_have_worked_before_are_started_again_if_they_end_while_they_start(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SERVER", "dies-once")
    with start_pool(python, tmp_path, per_node=2, have_worked=True) as pool:
        assert [http_status(f"{url}/health", pool.api_key) for url in pool.urls] == [200, 200]
        assert len(list((tmp_path / "logs").glob("died-*"))) == 2
        assert pool.take_lost() == {}
    assert alive(tmp_path) == []


def test_a_part_of_a_server_on_several_nodes_only_tells_its_health(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SERVER", "part")
    with start_pool(python, tmp_path) as pool:
        assert http_status(f"{pool.urls[0]}/model_info", pool.api_key) == 404


def test_a_server_that_ends_while_another_one_starts_reads_its_key_again(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SERVER", "second-waits")
    killed: list[str] = []

    def kill_once(url: str, key: str | None) -> int | None:
        status = http_status(url, key)
        if status == 200 and not killed:
            killed.append(url)
            kill(tmp_path, url.removesuffix("/health"))
            (tmp_path / "logs/go").touch()
        return status

    monkeypatch.setattr(servers, "http_status", kill_once)
    with start_pool(python, tmp_path, per_node=2, have_worked=True) as pool:
        assert [http_status(f"{url}/model_info", pool.api_key) for url in pool.urls] == [200, 200]
        assert killed == [f"{pool.urls[0]}/health"]
        assert (tmp_path / "logs/sglang_0.log").read_text().count("server_args") == 2
        assert pool.take_lost() == {}


@pytest.mark.parametrize(("dies", "number"), [("dies", 0), ("second-dies", 1)])
@pytest.mark.parametrize("max_restarts", [0, 2])
def test_a_server_that_never_starts_is_an_error_even_if_it_has_worked(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_restarts: int, dies: str, number: int
) -> None:
    monkeypatch.setenv("FAKE_SERVER", dies)
    words = rf"(?s)SGLang server {number} .*ended with status 3.*out of luck"
    with pytest.raises(ServerDiedError, match=words):
        start_pool(python, tmp_path, per_node=number + 1, have_worked=True, max_restarts=max_restarts)
    assert (tmp_path / f"logs/sglang_{number}.log").read_text().count("out of luck") == max_restarts + 1
    assert alive(tmp_path) == []


def kill(tmp_path: Path, url: str) -> None:
    """Send SIGKILL to the server at a URL, once it listens there."""
    port = url.rpartition(":")[2]
    wait_until(lambda: http_status(f"{url}/health", None) == 200, "the server runs")
    for process in alive(tmp_path):
        arguments = process.cmdline()
        if arguments[1] == str(PROGRAM) and arguments[arguments.index("--port") + 1] == port:
            process.kill()


def test_without_restarts_a_server_that_is_killed_is_an_error_that_names_it(python: str, tmp_path: Path) -> None:
    with start_pool(python, tmp_path, per_node=2, max_restarts=0) as pool:
        kill(tmp_path, pool.urls[1])

        def dead() -> bool:
            try:
                pool.check()
            except ServerDiedError as error:
                message.append(str(error))
            return bool(message)

        message: list[str] = []
        wait_until(dead, "the check raises")
        assert f"SGLang server 1 ({pool.urls[1]}) ended with status 137" in message[0]


def test_a_server_that_is_killed_is_started_again_at_its_port_with_the_same_key_and_log(
    python: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    log = tmp_path / "logs/sglang_1.log"
    with start_pool(python, tmp_path, per_node=2) as pool:
        kill(tmp_path, pool.urls[1])
        wait_until(lambda: "runs again" in caplog.text, "the server is back")
        assert http_status(f"{pool.urls[1]}/model_info", pool.api_key) == 200
        pool.check()
        assert pool.take_lost().keys() == {pool.urls[1]}
        assert pool.take_lost() == {}
        assert log.read_text().count("server_args") == 2
        assert str(pool.api_key) not in log.read_text()
        assert not list(log.parent.glob("*.yaml"))
    assert f"SGLang server 1 ({pool.urls[1]}) ended with status 137" in caplog.text
    assert "starting it again (1 of 3 times)" in caplog.text
    assert alive(tmp_path) == []


def test_a_loss_is_told_before_anybody_can_see_the_server_back(python: str, tmp_path: Path) -> None:
    with start_pool(python, tmp_path) as pool:
        for _ in range(3):
            kill(tmp_path, pool.urls[0])
            wait_until(lambda: http_status(f"{pool.urls[0]}/health", None) is None, "the server is gone")
            wait_until(lambda: http_status(f"{pool.urls[0]}/health", None) == 200, "the server is back")
            assert "status 137" in pool.take_lost()[pool.urls[0]]


def _is_lost(pool: ServerPool, url: str) -> bool:
    return url in pool.take_lost()


def _is_given_up(caplog: pytest.LogCaptureFixture, url: str) -> bool:
    return f"({url}) ended" in caplog.text.rpartition("again (1 of 1")[2]


def test_past_its_restarts_a_server_stays_away_and_without_any_the_check_raises(
    python: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with start_pool(python, tmp_path, per_node=2, max_restarts=1) as pool:
        for url in pool.urls:
            assert pool.may_return()
            pool.check()
            kill(tmp_path, url)
            wait_until(functools.partial(_is_lost, pool, url), "the death is noticed")
            kill(tmp_path, url)
            wait_until(functools.partial(_is_given_up, caplog, url), "it is given up")
        assert not pool.may_return()
        with pytest.raises(ServerDiedError, match=r"(?s)no SGLang server is left: .*server 0 .*server 1 "):
            pool.check()
    assert caplog.text.count("rollout.servers.max_restarts=1: it is not started again") == 2


def test_a_pool_that_stops_starts_nothing_again(python: str, tmp_path: Path) -> None:
    with start_pool(python, tmp_path) as pool:
        kill(tmp_path, pool.urls[0])
    assert alive(tmp_path) == []


def test_a_server_that_ignores_sigterm_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ServerProcess("server", "http://127.0.0.1:32300", tmp_path / "server.log", grace_s=0.5)
    command = [sys.executable, str(PROGRAM), "--config", str(server.key_file), "--port", "32300", str(tmp_path)]
    monkeypatch.setenv("FAKE_SERVER", "stubborn")
    server.start(command, os.environ, "k")

    def members() -> list[psutil.Process]:
        mine = [process for process in alive(tmp_path) if process.cmdline()[1] == str(PROGRAM)]
        return mine + [child for process in mine for child in process.children()]

    wait_until(lambda: len(members()) == 2, "the server has a child")
    family = members()
    server.stop()
    server.join()
    _, left = psutil.wait_procs(family, timeout=10)
    assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGTERM])
def test_a_trainer_that_is_killed_leaves_no_server_behind(python: str, tmp_path: Path, death: signal.Signals) -> None:
    code = f"""
import signal
from pathlib import Path
from tests.support.rollout.fake_pools import start_pool
start_pool({python!r}, Path({str(tmp_path)!r}))
print("started", flush=True)
signal.pause()
"""
    trainer = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
    )
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "started\n"
    assert alive(tmp_path)
    trainer.send_signal(death)
    trainer.wait(10)
    trainer.stdout.close()
    wait_until(lambda: not alive(tmp_path), "no process of the server is left")


def test_given_servers_are_reached_and_left_alone(python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start_pool(python, tmp_path) as owner:
        monkeypatch.setenv("DYPO_SGLANG_API_KEY", str(owner.api_key))
        with start_pool(python, tmp_path, urls=(owner.urls[0] + "/",)) as guest:
            assert guest.urls == owner.urls
            assert guest.api_key == owner.api_key
        owner.check()
        assert alive(tmp_path)


def test_a_wrong_key_for_given_servers_is_an_error_that_names_the_variable(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with start_pool(python, tmp_path) as owner:
        monkeypatch.setenv("DYPO_SGLANG_API_KEY", "wrong")
        with pytest.raises(ValueError, match="refuses the API key: set DYPO_SGLANG_API_KEY"):
            start_pool(python, tmp_path, urls=owner.urls)


@pytest.mark.parametrize(("how", "temperature"), [("ok", 0.7), ("tempered", 1.0)])
def test_given_servers_with_the_right_log_probs_are_accepted(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, temperature: float
) -> None:
    monkeypatch.setenv("FAKE_SERVER", how)
    with start_pool(python, tmp_path) as owner:
        monkeypatch.setenv("DYPO_SGLANG_API_KEY", str(owner.api_key))
        assert start_pool(python, tmp_path, urls=owner.urls, temperature=temperature).urls == owner.urls


def test_given_servers_with_tempered_log_probs_are_refused(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SERVER", "tempered")
    with start_pool(python, tmp_path) as owner:
        monkeypatch.setenv("DYPO_SGLANG_API_KEY", str(owner.api_key))
        with pytest.raises(ValueError, match=r"temperature=0\.7: .*SGLANG_RETURN_ORIGINAL_LOGPROB=1"):
            start_pool(python, tmp_path, urls=owner.urls, temperature=0.7)


@pytest.mark.parametrize("info", [{}, {"enable_return_routed_experts": False}, {"enable_return_routed_experts": True}])
def test_given_servers_must_be_able_to_return_their_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, info: dict[str, bool]
) -> None:
    monkeypatch.setitem(fake_sglang._ABOUT, "/server_info", info)
    with FakeSGLang() as fake:
        cfg = ServersConfig(urls=(fake.url,))
        start = functools.partial(start_servers, cfg, tmp_path, "float32", tmp_path, seed=1, device="cpu")
        assert start().urls == cfg.urls
        if all(info.values()) and info:
            assert start(returns_routes=True).urls == cfg.urls
        else:
            with pytest.raises(ValueError, match=f"{fake.url} cannot return the experts .*--enable-return-routed"):
                start(returns_routes=True)


@pytest.mark.parametrize(
    "info", [{}, {"enable_deterministic_inference": False}, {"enable_deterministic_inference": True}]
)
def test_servers_tell_whether_they_honour_seeds(monkeypatch: pytest.MonkeyPatch, info: dict[str, bool]) -> None:
    monkeypatch.setitem(fake_sglang._ABOUT, "/server_info", info)
    with FakeSGLang() as fake:
        assert ServerPool(["http://127.0.0.1:9", fake.url], "key").honours_seeds() is any(info.values())


def test_a_given_server_that_never_answers_is_named_at_the_deadline(python: str, tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"http://127\.0\.0\.1:9 is not healthy after 0\.3 s"):
        start_pool(python, tmp_path, urls=("http://127.0.0.1:9",), start_deadline_s=0.3)


def test_of_given_servers_none_is_known_as_lost() -> None:
    assert ServerPool(["http://a:1"], None).take_lost() == {}


def test_given_servers_may_return_only_where_somebody_starts_them_again() -> None:
    urls = ("http://node1:30000",)
    assert not ServerPool(urls, None).may_return()
    assert ServerPool(urls, None, urls_are_restarted=True).may_return()
    with pytest.raises(ValueError, match="urls_are_restarted=true: needs urls"):
        ServersConfig(urls_are_restarted=True)


def test_a_run_that_counts_on_servers_of_other_nodes_is_told_that_it_starts_none(python: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rollout\.servers\.nodes=4: a run starts servers on its own node only"):
        start_pool(python, tmp_path, nodes=4)
    assert alive(tmp_path) == []


def test_what_is_healthy_but_no_sglang_server_is_named(python: str, tmp_path: Path) -> None:
    with FakeSGLang() as fake:
        fake.hide("/model_info")
        with pytest.raises(ValueError, match=f"{fake.url}/model_info: HTTP 404: .* not an SGLang"):
            start_pool(python, tmp_path, urls=(fake.url,))
