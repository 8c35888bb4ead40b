"""One SGLang server for all cells of a study.

With one server not every cell waits for its own to start. Each run brings it the run's weights before it asks for
anything, and every cell's model has the same shape.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from whole_job.guarded import start

from megatron_dypo.config.reading.load import flow_yaml

KEY = "DYPO_SGLANG_API_KEY"
CLI = (sys.executable, "-m", "megatron_dypo.cli")
_READY = b"serving at "
"""The words of ``megatron-dypo serve`` that follow the start of its servers."""
_LOOK_EVERY_S = 0.2
_GRACE_S = 30.0
"""Seconds between SIGTERM and SIGKILL."""


@contextlib.contextmanager
def kept_server(config: str, arm: Mapping[str, Any], log_dir: Path, port: int) -> Iterator[None]:
    """Keep ``megatron-dypo serve`` alive inside the block, with a key that the commands of the block inherit.

    Args:
        arm: overrides of a cell; the server reads those of its model and of the rollouts.

    Raises:
        ValueError: the server ended before it was ready, for example because the port is taken.
    """
    os.environ.setdefault(KEY, secrets.token_hex(16))
    own = {key: value for key, value in arm.items() if key.startswith(("model.", "rollout."))}
    own |= {"rollout.servers.port": port, "rollout.servers.urls": [], "rollout.servers.urls_are_restarted": False}
    words = [f"{key}={flow_yaml(value)}" for key, value in own.items()]
    log_dir.mkdir(parents=True, exist_ok=True)
    path = log_dir / "serve.log"
    with path.open("ab") as log:
        begin = log.tell()
        process = start([*CLI, "serve", config, *words, "--log-dir", str(log_dir)], _GRACE_S, log)
    try:
        _await_ready(process, path, begin)
        yield
    finally:
        process.terminate()
        process.wait()


def _await_ready(process: subprocess.Popen[bytes], path: Path, begin: int) -> None:
    """Return when the part of the log from ``begin`` says that the server is ready. ``serve`` has its own deadline."""
    print(f"starting the server of all cells, log {path}", flush=True)
    while _READY not in path.read_bytes()[begin:]:
        if process.poll() is not None:
            words = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise ValueError(f"{path}: the server ended before it was ready: {''.join(words)}")
        time.sleep(_LOOK_EVERY_S)
