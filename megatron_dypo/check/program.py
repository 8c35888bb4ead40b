"""The Python interpreter that runs the servers of a run."""

from __future__ import annotations

import importlib.util
import shutil

from megatron_dypo.config.rollout import ServersConfig


def missing_program(servers: ServersConfig) -> list[str]:
    """Return what is missing to start the run's own servers, without starting anything."""
    if servers.urls:
        return []
    if servers.python is not None:
        if shutil.which(servers.python) is None:
            return [f"rollout.servers.python={servers.python!r}: no such program"]
        return []
    if importlib.util.find_spec("sglang") is None:
        return [
            "rollout.servers.python=null: sglang is not installed beside this package: name an interpreter that has "
            "it, or servers that run already in rollout.servers.urls"
        ]
    return []
