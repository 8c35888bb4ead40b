"""The routes of SGLang's own application, without a model and without the key."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="SGLang is not installed")


def ask_all(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.support.sglang_routes", *arguments],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_no_route_of_a_server_but_health_answers_without_the_key() -> None:
    answer = ask_all()
    found = answer["found"]
    assert len({path for _, path, _ in found}) > 80
    assert answer["metrics"] == {"with the key": 200, "without": 401}
    sockets = {path: first for method, path, first in found if method == "WEBSOCKET"}
    assert sockets
    assert set(sockets.values()) == {"websocket.close"}
    assert ["GET", "/health", 401] not in found
    answering = {path for method, path, status in found if method != "WEBSOCKET" and status not in (401, 403)}
    assert answering <= {"/health", "/health_generate", "/ready"}


@pytest.mark.slow
def test_sglang_leaves_routes_open_which_the_launchers_close() -> None:
    """Once SGLang closes them, ``sglang_keyed.py`` is not needed."""
    answer = ask_all("as-is")
    assert answer["metrics"]["without"] == 200
    assert [first for method, _, first in answer["found"] if method == "WEBSOCKET" and first != "websocket.close"]
