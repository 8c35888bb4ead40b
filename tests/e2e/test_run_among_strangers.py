"""A real run, every port of which somebody without a key tries from another address (a network namespace)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.e2e.commands import DEADLINE_S, REPOSITORY
from tests.support.e2e.parity_task import write_task

NAMESPACES = ["unshare", "--map-root-user", "--mount", "--net", "--kill-child"]
HERE = "10.77.0.1"


def can_make_namespaces() -> bool:
    """Return whether this user may make network namespaces with an interface between them."""
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        return False
    test = [*NAMESPACES, "ip", "link", "add", "eth9", "type", "veth", "peer", "name", "eth8"]
    return subprocess.run(test, capture_output=True, check=False).returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_make_namespaces(), reason="this user cannot make network namespaces"),
]


def run_among_strangers(folder: Path, *overrides: str, **environment: str) -> dict[str, Any]:
    config = write_task(folder, run={"steps": 1000}, parallel={"pipeline": 2}, refit={"transport": "p2p"})
    command = [*NAMESPACES, "sh", str(REPOSITORY / "tests/support/e2e/two_hosts.sh")]
    command += [sys.executable, "-m", "tests.support.e2e.run_among_strangers", str(config), *overrides]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=env,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["witness"].startswith("HTTP/1.0"), "the other host reaches this one"
    return found


def test_a_run_on_one_host_listens_on_loopback_addresses_alone(tmp_path: Path) -> None:
    found = run_among_strangers(tmp_path)
    assert len(found["listening"]) > 30
    assert {address for address, _ in found["listening"]} == {"127.0.0.1"}
    assert set(found["answers"].values()) == {None}


def test_on_the_network_only_the_server_answers_and_it_asks_for_the_key(tmp_path: Path) -> None:
    """Groups and server listen on the network, as on a cluster; the refit's store is behind a door there."""
    interfaces = {"GLOO_SOCKET_IFNAME": "eth9", "NCCL_SOCKET_IFNAME": "eth9"}
    found = run_among_strangers(tmp_path, f"rollout.servers.host={HERE}", **interfaces)
    assert {address for address, _ in found["listening"]} == {"127.0.0.1", HERE}
    answered = [answer for answer in found["answers"].values() if answer is not None]
    assert [answer.split()[:2] for answer in answered] == [["HTTP/1.1", "401"]]
