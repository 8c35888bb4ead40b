"""Opens the connection of a run, by the configured transport or by the best one that all servers support."""

from __future__ import annotations

import functools
import logging
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from megatron_dypo.config.refit import RefitConfig
from megatron_dypo.models.architecture import Architecture
from megatron_dypo.refit.answers import ServerError, ServerInfo
from megatron_dypo.refit.control import SGLangControl
from megatron_dypo.refit.deadline import Deadline
from megatron_dypo.refit.lockstep import Lockstep
from megatron_dypo.refit.source import Source
from megatron_dypo.refit.transports.base import Connection
from megatron_dypo.refit.transports.broadcast import BroadcastConnection
from megatron_dypo.refit.transports.planned import PlannedConnection
from megatron_dypo.refit.transports.reported_mesh import planned_problem
from megatron_dypo.refit.transports.update_group import address_towards_all

Kind = Literal["local", "p2p", "broadcast"]
KINDS: tuple[Kind, ...] = ("local", "p2p", "broadcast")
"""Transports, the best one first."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

logger = logging.getLogger(__name__)


def connect(
    source: Source, control: SGLangControl | None, lockstep: Lockstep, config: RefitConfig, deadline: Deadline
) -> Connection:
    """Choose among ``local``, ``p2p`` and ``broadcast``, and connect with all servers. Collective over the world.

    Ranks that lead a stage or own experts need ``control``, since they may broadcast. The global leader asks the
    servers.

    Raises:
        RefitError: on all ranks. Nothing stays open then.
    """
    leader = control if source.layout.is_global_leader else None
    one_host = len(set(lockstep.gather(host_id()))) == 1
    ask = functools.partial(_ask_and_choose, config=config, one_host=one_host, arch=source.arch, deadline=deadline)
    chosen = lockstep.run(functools.partial(ask, leader) if leader else None)
    kind = next(kind for kind in lockstep.gather(chosen) if kind is not None)
    if kind == "broadcast":
        return BroadcastConnection.open(source, control, lockstep, config.bucket_mib * 2**20, deadline)
    return PlannedConnection.open(source, leader, lockstep, kind, config, deadline)


def choose(config: RefitConfig, infos: Sequence[ServerInfo], one_host: bool, arch: Architecture) -> tuple[Kind, str]:
    """Return the transport, and the reason for it.

    Args:
        one_host: whether all trainer ranks are on this host.
        arch: the policy. Its name table, from which a refit is planned, is missing if it is bridged.

    Raises:
        ServerError: the requested transport is not possible; with ``auto``, no transport is.
    """
    planned = "the model has no name table (model.family=bridge)" if arch.is_bridged else planned_problem(infos, arch)
    quantizes = config.quantize != "none"
    problems: dict[str, str | None] = {
        "local": planned or _local_problem(infos, one_host),
        "p2p": planned,
        "broadcast": "it does not quantise (refit.quantize)" if quantizes else None,
    }
    possible = [kind for kind in KINDS if problems[kind] is None]
    if config.transport == "auto":
        reasons = "; ".join(f"not {kind}: {problem}" for kind, problem in problems.items() if problem)
        if not possible:
            raise ServerError(f"refit.transport=auto: {reasons}")
        return possible[0], reasons or "trainer and servers share this host"
    for kind in possible:
        if kind == config.transport:
            return kind, "as configured"
    raise ServerError(f"refit.transport={config.transport}: {problems[config.transport]}")


def host_id() -> str:
    """Return a text that is the same for all processes on a host, also in containers, and differs between hosts."""
    return _BOOT_ID.read_text().strip()


def is_here(url: str) -> bool:
    """Return whether a server's address belongs to this host: packets to it then leave from the same address."""
    parts = urlsplit(url)
    address = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_DGRAM)[0][4][0]
    return address_towards_all([url]) == address


def _ask_and_choose(
    control: SGLangControl, *, config: RefitConfig, one_host: bool, arch: Architecture, deadline: Deadline
) -> Kind:
    kind, reason = choose(config, control.describe(deadline), one_host, arch)
    logger.info("weights go to the servers by transport=%s: %s", kind, reason)
    return kind


def _local_problem(infos: Sequence[ServerInfo], one_host: bool) -> str | None:
    if not one_host:
        return "the trainer's ranks are on several hosts"
    return next((f"{info.url} is on another host" for info in infos if not is_here(info.url)), None)
