"""Start pools of servers that are real processes of a fake server program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_dypo.config.rollout import ServersConfig
from megatron_dypo.rollout.server.servers import ServerPool, start_servers


def start_pool(
    python: str, tmp_path: Path, *, temperature: float = 1.0, have_worked: bool = False, **fields: Any
) -> ServerPool:
    """Start servers that ``python`` runs; ``fields`` are those of ``ServersConfig``."""
    cfg = ServersConfig(**{"python": python, "port": 32200, "start_deadline_s": 30.0, **fields})
    return start_servers(
        cfg,
        tmp_path,
        "float32",
        tmp_path / "logs",
        seed=1,
        device="cpu",
        temperature=temperature,
        have_worked=have_worked,
    )
