"""A trainer that is stopped as a whole for longer than its requests may take, and goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.support.fake_sglang import FakeSGLang, wait_until

_DEADLINE_S = 6.0
_PROGRAM = f"""
import sys
from megatron_dypo.rollout.collect import collect
from tests.support.rollout.clients import make_client, make_prompts
client = make_client([sys.argv[1]], retries=1, request_deadline_s={_DEADLINE_S})
groups, stats = collect(make_prompts(3), client, group_size=2, progress=False)
print(len(groups), stats.dropped)
"""


def test_requests_that_were_open_while_the_trainer_was_stopped_are_made_again() -> None:
    root = Path(__file__).parents[3]
    with FakeSGLang(lambda index, body: "hang" if index < 3 else "ok") as server:
        with subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, server.url],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(root)},
            text=True,
        ) as trainer:
            try:
                wait_until(lambda: len(server.requests) == 3, "three groups are asked for", 60.0)
                trainer.send_signal(signal.SIGSTOP)
                time.sleep(2.0 * _DEADLINE_S)
                trainer.send_signal(signal.SIGCONT)
                said, _ = trainer.communicate(timeout=60)
            finally:
                trainer.kill()
        assert said == "3 ()\n"
        assert len(server.requests) == 6
        server.release()
