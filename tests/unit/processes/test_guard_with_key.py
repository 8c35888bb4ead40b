"""No key is left on the disk, in whatever way a server or its trainer ends."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_dypo.processes.guard_with_key import forget_key, hide_key
from megatron_dypo.rollout.server.process import ServerDiedError, ServerProcess
from tests.support.fake_sglang import wait_until

SERVER = """
import sys, time
key = open(sys.argv[1]).read()
print("server_args=", repr({"file": key}), flush=True)
time.sleep(float(sys.argv[2]))
sys.exit(1)
"""
"""It logs its key as SGLang does, and ends before it is healthy."""


def start(folder: Path, key: str, seconds: float) -> ServerProcess:
    server = ServerProcess("server", "http://127.0.0.1:9", folder / "server.log", grace_s=0.1)
    server.start([sys.executable, "-c", SERVER, str(server.key_file), str(seconds)], os.environ, key)
    return server


def holding(folder: Path, key: str) -> list[str]:
    """Return the names of files with the key in them. A file may be removed in the meantime."""
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            if key in path.read_text() or path.name.endswith(".yaml"):
                found.append(path.name)
    return found


def test_a_server_that_ends_while_it_starts_leaves_no_key(tmp_path: Path) -> None:
    key = secrets.token_hex(16)
    server = start(tmp_path, key, 0)
    server.wait()
    assert "server_args=" in server.log_path.read_text()
    assert holding(tmp_path, key) == [], "before anybody joins it"
    with pytest.raises(ServerDiedError) as error:
        server.check()
    assert key not in str(error.value)
    server.join()


def test_a_server_whose_guard_is_killed_leaves_no_key_once_it_is_joined(tmp_path: Path) -> None:
    key = secrets.token_hex(16)
    server = start(tmp_path, key, 600)
    wait_until(lambda: "server.log" in holding(tmp_path, key), "the server has logged its key")
    assert server._guard is not None
    server._guard.kill()
    server.join()
    assert holding(tmp_path, key) == []


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGTERM])
def test_a_trainer_that_is_killed_while_its_server_starts_leaves_no_key(tmp_path: Path, death: signal.Signals) -> None:
    key = secrets.token_hex(16)
    code = f"""
import os, signal
from pathlib import Path
from tests.unit.processes.test_guard_with_key import start
start(Path({str(tmp_path)!r}), os.environ["KEY"], 600)
signal.pause()
"""
    env = {**os.environ, "KEY": key}
    with subprocess.Popen([sys.executable, "-c", code], env=env, cwd=Path(__file__).parents[3]) as trainer:
        wait_until(lambda: "server.log" in holding(tmp_path, key), "the server has logged its key")
        trainer.send_signal(death)
    wait_until(lambda: holding(tmp_path, key) == [], "no file holds the key")


@pytest.mark.parametrize("key", ["plain", "with'quote", 'with"two"', "back\\slash"])
def test_a_key_is_hidden_as_python_and_json_quote_it(key: str) -> None:
    shown = f"{key} {key!r} {{'key': {key!r}}}".encode()
    assert key.encode() not in hide_key(shown, key)
    assert len(hide_key(shown, key)) == len(shown)
    assert repr(key)[1:-1].encode() not in hide_key(shown, key)


def test_a_key_is_found_wherever_it_lies_in_a_long_log(tmp_path: Path) -> None:
    log, key = tmp_path / "server.log", secrets.token_hex(16)
    block = 2**20
    places = [0, block - 17, 2 * block - 40, 2 * block - 3, 3 * block]
    text = bytearray(b"." * (4 * block))
    for place in places:
        text[place : place + len(key)] = key.encode()
    log.write_bytes(text)
    forget_key(tmp_path / "key.yaml", log, key)
    assert log.read_bytes() == bytes(text).replace(key.encode(), b"*" * len(key))


def test_lines_that_a_server_writes_meanwhile_stay(tmp_path: Path) -> None:
    log, key = tmp_path / "server.log", secrets.token_hex(16)
    log.write_text(f"{key}\n")

    def write() -> None:
        with log.open("a") as file:
            for number in range(2000):
                print(number, file=file, flush=True)

    writer = threading.Thread(target=write)
    writer.start()
    while writer.is_alive():
        forget_key(tmp_path / "key.yaml", log, key)
    assert log.read_text().split() == ["*" * len(key), *map(str, range(2000))]
