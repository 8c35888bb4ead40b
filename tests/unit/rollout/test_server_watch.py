"""A server that stops answering is named once; one that refuses connections or answers with an error is not."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import psutil
import pytest
from aiohttp.client_reqrep import ConnectionKey

from megatron_dypo.rollout.server.process import ServerProcess
from megatron_dypo.rollout.server.reach import is_answer_of_host
from megatron_dypo.rollout.server.watch import ServerWatch
from tests.support.fake_sglang import wait_until
from tests.support.present import present

PROGRAM = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(int(sys.argv[1])); self.send_header("Content-Length", "0"); self.end_headers()
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@contextlib.contextmanager
def serving(status: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start a process that answers every GET with ``status``; give it and its URL."""
    command = [sys.executable, "-c", PROGRAM, str(status)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process, f"http://127.0.0.1:{present(process.stdout).readline().strip()}"
        finally:
            process.kill()


@pytest.mark.parametrize("status", [200, 503])
def test_a_stopped_server_is_named_once_and_again_when_it_answers(status: int) -> None:
    said: queue.Queue[str] = queue.Queue()
    with serving(status) as (process, url), serving(status) as (_, other):
        with ServerWatch([url, other], "key", said.put, every_s=0.2, silence_s=0.6):
            with pytest.raises(queue.Empty):
                said.get(timeout=1.0)
            process.send_signal(signal.SIGSTOP)
            assert f"stall: the server {url} has " in said.get(timeout=60)
            with pytest.raises(queue.Empty):
                said.get(timeout=1.0)
            process.send_signal(signal.SIGCONT)
            assert f"stall over: the server {url} answers again, after " in said.get(timeout=60)
        assert said.empty()


def test_a_server_that_has_ended_is_left_to_its_supervisor() -> None:
    said: queue.Queue[str] = queue.Queue()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with ServerWatch([url], None, said.put, every_s=0.1, silence_s=0.2), pytest.raises(queue.Empty):
            said.get(timeout=1.0)


def test_silence_counts_from_the_last_answer_without_the_time_in_which_the_trainer_was_stopped() -> None:
    said: list[str] = []
    watch = ServerWatch(["http://a", "http://b"], None, said.append, every_s=10.0, silence_s=30.0)
    with watch:
        watch.judge([True, True], 1e9, {})
        watch.judge([False, True], 1e9 + 20, {})
        watch.excuse(3600.0)
        watch.judge([False, True], 1e9 + 3620, {})
        assert said == []
        watch.judge([False, True], 1e9 + 3631, {})
        watch.judge([False, True], 1e9 + 3641, {})
    (line,) = said
    assert line.startswith("stall: the server http://a has not answered for 31 s")


def test_a_stopped_process_behind_a_server_that_answers_is_named(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys, time; subprocess.Popen(['sleep', '600']); print('up', flush=True); time.sleep(600)"
    )
    server = ServerProcess("server 0", "http://a", tmp_path / "log", grace_s=0.1)
    server.start([sys.executable, "-c", program], os.environ, "key")
    try:
        wait_until(lambda: "up" in server.log_path.read_text(), "the server starts")
        assert server.stopped_process() is None
        (inner,) = [p for p in psutil.Process().children(recursive=True) if p.name() == "sleep"]
        inner.suspend()
        wait_until(lambda: server.stopped_process() == f"process {inner.pid} (sleep)", "the stopped process is seen")
    finally:
        server.stop()
        server.join()
    assert server.stopped_process() is None
    said: list[str] = []
    with ServerWatch(["http://a"], None, said.append, every_s=10.0, silence_s=30.0) as watch:
        watch.judge([True], 1e9, {})
        for now in (1e9 + 10, 1e9 + 40):
            watch.judge([True], now, {"http://a": "process 4711 (sglang::scheduler)"})
    assert said == ["stall: the server http://a has stood still for 40 s: process 4711 (sglang::scheduler) is stopped"]


def test_a_server_that_hangs_is_ended_by_the_one_who_started_it_and_by_nobody_else() -> None:
    said: list[str] = []
    ended: list[str] = []

    def end(url: str) -> bool:
        ended.append(url)
        return url == "http://a"

    watch = ServerWatch(
        ["http://a", "http://b"], None, said.append, stacks_of=lambda url: f"in {url}", end=end, ends_s=100.0
    )
    with watch:
        watch.judge([True, True], 1e9, {})
        watch.judge([False, False], 1e9 + 90, {})
        assert [line.partition(":\n")[2] for line in said] == ["in http://a", "in http://b"]
        assert ended == []
        watch.judge([False, False], 1e9 + 100, {})
        assert ended == ["http://a", "http://b"]
        assert said[2:] == ["the server http://a is ended: it has not moved for 100 s (run.watchdog_s)"]
        watch.judge([True, False], 1e9 + 110, {})  # it starts again
        watch.excuse(3600.0)
        watch.judge([False, True], 1e9 + 3720, {})
    assert len(said) == 4
    assert said[3].startswith("stall over: the server http://b answers again")


@pytest.mark.parametrize(
    ("error", "is_answer"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), True),
        (OSError(errno.EHOSTUNREACH, "no route"), False),
        (socket.gaierror(socket.EAI_NONAME, "unknown"), False),
    ],
)
def test_an_answer_of_the_network_is_none_of_the_server(error: OSError, is_answer: bool) -> None:
    key = ConnectionKey("node3", 30000, False, True, None, None, None)
    assert is_answer_of_host(aiohttp.ClientConnectorError(key, error)) is is_answer
    assert is_answer_of_host(aiohttp.ServerDisconnectedError())
    assert is_answer_of_host(aiohttp.ClientPayloadError("cut short"))
