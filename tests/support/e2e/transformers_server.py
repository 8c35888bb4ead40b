"""A real server of another kind than SGLang: ``transformers serve``, with OpenAI's API and no more."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_dypo.rollout.server.command import lease_port
from megatron_dypo.rollout.server.probe import HEALTH_EVERY_S, http_status
from tests.support.e2e.commands import DEADLINE_S

_MAIN = """
import sys
sys.modules["torchvision"] = None  # this torch cannot load it
from transformers import PreTrainedModel
from transformers.cli.transformers import main
load = PreTrainedModel.from_pretrained.__func__
# A device map needs accelerate. Without one, the model is on the CPU.
PreTrainedModel.from_pretrained = classmethod(lambda cls, *args, device_map=None, **kwargs: load(cls, *args, **kwargs))
main()
"""


@contextlib.contextmanager
def transformers_server(model_path: Path, log_path: Path) -> Iterator[str]:
    """Start a server in float32 on the CPU, wait until it has the model, give its URL, and stop it with the block."""
    lease = lease_port("127.0.0.1", 31900)
    place = ["--host", "127.0.0.1", "--port", str(lease.port)]
    command = [sys.executable, "-c", _MAIN, "serve", str(model_path), *place, "--device", "cpu", "--dtype", "float32"]
    url = f"http://127.0.0.1:{lease.port}"
    with log_path.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        try:
            deadline = time.monotonic() + DEADLINE_S
            while http_status(f"{url}/health", None) != 200:
                assert process.poll() is None, log_path.read_text()[-3000:]
                assert time.monotonic() < deadline, log_path.read_text()[-3000:]
                time.sleep(HEALTH_EVERY_S)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(60)
            lease.release()
