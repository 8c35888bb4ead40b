"""A real SGLang with OpenAI's API: a server as a run starts it, but with a tokenizer."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_dypo.config.rollout import ServersConfig
from megatron_dypo.rollout.server.command import (
    available_cores,
    lease_port,
    link_package,
    server_command,
    server_environment,
)
from megatron_dypo.rollout.server.probe import HEALTH_EVERY_S, http_status
from megatron_dypo.rollout.server.process import ServerProcess
from tests.support.e2e.commands import DEADLINE_S


@dataclass(frozen=True, kw_only=True)
class OpenAIServer:
    """A server that answers; it names its model by the model's folder."""

    url: str
    api_key: str


@contextlib.contextmanager
def openai_server(model_path: Path, folder: Path) -> Iterator[OpenAIServer]:
    """Start a server in float32 on the CPU, wait until it is healthy, and stop it with the block."""
    cfg = ServersConfig()
    lease = lease_port(cfg.host, 31800)
    process = ServerProcess("SGLang", f"http://{cfg.host}:{lease.port}", folder / "sglang.log")
    command = server_command(
        cfg,
        index=0,
        port=lease.port,
        model_path=model_path,
        dtype="float32",
        seed=1,
        device="cpu",
        key_file=process.key_file,
    )
    command.remove("--skip-tokenizer-init")
    python_path = link_package(folder / "python_path")
    environment = server_environment(os.environ, 1, "cpu", available_cores(), python_path, host=cfg.host)
    key = secrets.token_hex(16)
    process.start(command, environment, key)
    try:
        deadline = time.monotonic() + DEADLINE_S
        while http_status(f"{process.url}/health", key) != 200:
            process.check()
            assert time.monotonic() < deadline, process.log_path.read_text()[-3000:]
            time.sleep(HEALTH_EVERY_S)
        yield OpenAIServer(url=process.url, api_key=key)
    finally:
        process.stop()
        process.join()
        lease.release()
