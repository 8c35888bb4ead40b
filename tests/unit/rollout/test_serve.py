"""A node's servers for a trainer on another node, with real processes in place of the servers."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from megatron_dypo.rollout.server.command import lease_port
from megatron_dypo.rollout.server.probe import http_status
from tests.support.fake_sglang import wait_until

PROGRAM = Path(__file__).parents[2] / "support/fake_server_program.py"
REPOSITORY = Path(__file__).parents[3]
KEY = "0123456789abcdef"


@pytest.fixture
def node(tmp_path: Path):
    """Give a function that starts ``megatron-dypo serve`` with two stand-ins at the ports after ``port``, as on one of
    four nodes; check that all have ended afterwards."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {PROGRAM} "$@" --mark {tmp_path}\n')
    python.chmod(0o755)
    started = []

    def start(port: int, *options: str, **environment: str) -> subprocess.Popen:
        servers = {"python": str(python), "per_node": 2, "nodes": 4, "port": port}
        config = {"model": {"hf_path": str(tmp_path), "dtype": "float32"}, "data": {"prompts": ["none.jsonl"]}}
        more = {"rollout": {"servers": servers}, "run": {"dir": str(tmp_path / "run")}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, **more}))
        arguments = ["serve", str(tmp_path / "config.yaml"), "--log-dir", str(tmp_path / "logs")]
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_dypo.cli", *arguments, *options],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "DYPO_SGLANG_API_KEY": KEY, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.terminate()
        process.communicate(timeout=60)


def is_up(port: int) -> bool:
    return http_status(f"http://127.0.0.1:{port}/model_info", KEY) == 200


def server_at(port: int) -> psutil.Process:
    return next(
        process
        for process in psutil.process_iter(["cmdline"])
        if str(PROGRAM) in (process.info["cmdline"] or [])[:2] and str(port) in process.info["cmdline"]
    )


def free_pair() -> int:
    """Return a port that is free together with the next one."""
    port = 31700
    while True:
        first = lease_port("127.0.0.1", port)
        second = lease_port("127.0.0.1", first.port + 1)
        first.release()
        second.release()
        if second.port == first.port + 1:
            return first.port
        port = second.port


def test_a_server_that_dies_comes_back_at_its_address_and_all_end_on_sigterm(node, tmp_path: Path) -> None:
    os.umask(0o022)
    port = free_pair()
    process = node(port)
    while "serving at" not in process.stdout.readline():
        assert process.poll() is None
    assert is_up(port)
    assert is_up(port + 1)
    server_at(port).kill()
    wait_until(lambda: not is_up(port), "gone")
    wait_until(lambda: is_up(port), "back", 60)
    assert sorted(path.name for path in (tmp_path / "logs").glob("*.log")) == ["sglang_0.log", "sglang_1.log"]
    assert stat.S_IMODE((tmp_path / "logs").stat().st_mode) == 0o700
    wait_until(
        lambda: all(KEY not in path.read_text() for path in (tmp_path / "logs").glob("sglang_*")), "no key in logs"
    )

    os.kill(process.pid, signal.SIGUSR1)
    assert is_up(port)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert not is_up(port)
    assert not is_up(port + 1)


@pytest.mark.slow
def test_a_server_that_is_stopped_is_named_ended_and_started_again(node) -> None:
    port = free_pair()
    process = node(port, "run.watchdog_s=32", "rollout.servers.stop_grace_s=1")
    while "serving at" not in process.stdout.readline():
        assert process.poll() is None
    stopped = server_at(port)
    stopped.suspend()
    said = [process.stdout.readline()]
    while said[-1] and "starting it again (1 of 3 times)" not in said[-1]:
        said.append(process.stdout.readline())
    text, url = "".join(said), f"http://127.0.0.1:{port}"
    assert f"stall: the server {url} has stood still for " in text
    assert f": process {stopped.pid} (" in text
    assert f"the server {url} is ended: it has not moved for " in text
    wait_until(lambda: is_up(port), "back", 60)


def test_a_server_that_cannot_start_ends_the_node_with_the_end_of_its_log(node) -> None:
    process = node(free_pair(), FAKE_SERVER="dies")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 69
    assert "megatron-dypo: error: servers_gone (status 69): SGLang server" in output
    assert "CUDA out of luck" in output


def test_a_server_of_a_run_with_a_checkpoint_may_end_while_it_starts(node, tmp_path: Path) -> None:
    step = tmp_path / "run/checkpoints/step_000002"
    step.mkdir(parents=True)
    (step / "trainer_state.json").write_text("{}")
    (step.parent / "latest_checkpointed_iteration.txt").write_text("2")
    port = free_pair()
    process = node(port, FAKE_SERVER="dies-once")
    lines = [process.stdout.readline()]
    while lines[-1] and "serving at" not in lines[-1]:
        lines.append(process.stdout.readline())
    assert is_up(port), "".join(lines)
    assert is_up(port + 1)
    assert sum("starting it again (1 of 3 times)" in line for line in lines) == 2


def test_a_port_that_is_taken_or_a_missing_key_is_one_line(node) -> None:
    port = free_pair()
    lease = lease_port("127.0.0.1", port)
    output, _ = node(port).communicate(timeout=60)
    lease.release()
    assert output == (
        f"megatron-dypo: error: port {port} of 127.0.0.1 is taken: end what listens there, "
        "or set rollout.servers.port\n"
    )
    output, _ = node(port, DYPO_SGLANG_API_KEY="").communicate(timeout=60)
    assert "DYPO_SGLANG_API_KEY is not set" in output
