"""Run the real router for tests: ``megatron-dypo route`` in a process of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from megatron_dypo.rollout.server.command import lease_port
from megatron_dypo.rollout.server.probe import http_status
from tests.support.fake_sglang import wait_until

REPOSITORY = Path(__file__).parents[2]


@contextlib.contextmanager
def running_router(
    folder: Path, servers: Sequence[str], key: str, *, host: str = "127.0.0.1"
) -> Iterator[tuple[str, subprocess.Popen]]:
    """Start a router; give its URL and process once it answers. Its output is in ``folder/router.log``."""
    lease = lease_port(host, 31800)
    url = f"http://{host}:{lease.port}"
    config = {
        "model": {"hf_path": str(folder), "dtype": "float32"},
        "data": {"prompts": ["none.jsonl"]},
        "rollout": {"servers": {"urls": list(servers), "router": url, "stop_grace_s": 1}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with contextlib.closing((folder / "router.log").open("w")) as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_dypo.cli", "route", str(folder / "config.yaml")],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "DYPO_SGLANG_API_KEY": key},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until(lambda: http_status(f"{url}/health", None) == 200, "the router answers", 60)
        yield url, process
    finally:
        process.terminate()
        process.wait(30)
        lease.release()
