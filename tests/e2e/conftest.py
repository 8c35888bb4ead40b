"""Real SGLang servers for end-to-end tests. In a test file:

    @pytest.fixture(scope="module")
    def pool(sglang_servers, tmp_path_factory):
        model = make_hf_model("qwen2", tmp_path_factory.mktemp("models") / "qwen2")
        return sglang_servers(model, per_node=2)  # a ServerPool: .urls, .api_key, .check()

The pool belongs to that file alone, and stops after its last test.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_dypo.config.rollout import ServersConfig
from megatron_dypo.rollout.server.servers import ServerPool, start_servers


@pytest.fixture(scope="module")
def sglang_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ServerPool]]:
    """Give a factory of servers on the CPU in float32, which live until the end of the test file.

    ``sglang_servers(model_path, dtype="float32", **fields of ServersConfig) -> ServerPool``. One start takes about
    15 s, and a server 2 GiB: share them within a file.
    """
    with contextlib.ExitStack() as stack:

        def start(model_path: Path, dtype: str = "float32", **fields: Any) -> ServerPool:
            cfg = ServersConfig(**{"port": 31000, "start_deadline_s": 900.0, **fields})
            log_dir = tmp_path_factory.mktemp("sglang")
            return stack.enter_context(start_servers(cfg, model_path, dtype, log_dir, seed=1, device="cpu"))

        yield start
