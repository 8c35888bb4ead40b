"""Which transport a run uses: the one that the configuration names, or the best that all servers support."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from megatron_dypo.refit.control import ServerError, ServerInfo, SGLangControl
from megatron_dypo.refit.deadline import Deadline
from megatron_dypo.refit.transports.base import Lockstep, Transport
from megatron_dypo.refit.transports.server_ranks import server_mesh
from megatron_dypo.refit.transports.update_group import address_towards

Kind = Literal["local", "p2p", "broadcast"]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

logger = logging.getLogger(__name__)


class ChosenTransport(Transport):
    """A transport that is made when the servers can be asked, at the first refit; it is kept until the end."""

    def __init__(
        self,
        requested: Literal["auto", "local", "p2p", "broadcast"],
        make: Mapping[Kind, Callable[[], Transport]],
        control: SGLangControl | None,
        lockstep: Lockstep,
    ) -> None:
        """``make``: the transports that can be had; ``control``: on the leader, None elsewhere."""
        self._requested = requested
        self._make = make
        self._control = control
        self._lockstep = lockstep
        self._chosen: Transport | None = None

    def send(self, version: int, deadline: Deadline) -> int:
        if self._chosen is None:
            one_host = len(set(self._lockstep.gather(host_id()))) == 1
            control = self._control
            kind = self._lockstep.run((lambda: self._choose(control, one_host, deadline)) if control else None)
            self._chosen = self._make[self._lockstep.gather(kind)[0]]()
        return self._chosen.send(version, deadline)

    def reset(self) -> None:
        if self._chosen is not None:
            self._chosen.reset()

    def close(self) -> None:
        if self._chosen is not None:
            self._chosen.close()

    def _choose(self, control: SGLangControl, one_host: bool, deadline: Deadline) -> Kind:
        kind, reason = choose(self._requested, control.describe(deadline), one_host, tuple(self._make))
        logger.info("weights go to the servers by transport=%s: %s", kind, reason)
        return kind


def choose(
    requested: Literal["auto", "local", "p2p", "broadcast"],
    infos: Sequence[ServerInfo],
    one_host: bool,
    offered: Sequence[Kind],
) -> tuple[Kind, str]:
    """The transport, and why; ``one_host``: all trainer ranks are on this host.

    Raises:
        ServerError: the requested one is not possible; with ``auto``, none is.
    """
    planned = _planned_problem(infos)
    problems: dict[Kind, str | None] = {
        "local": planned or _local_problem(infos, one_host),
        "p2p": planned,
        "broadcast": None if "broadcast" in offered else "it does not quantise (refit.quantize)",
    }
    if requested != "auto":
        if problem := problems[requested]:
            raise ServerError(f"refit.transport={requested}: {problem}")
        return requested, "as configured"
    possible = [kind for kind, problem in problems.items() if problem is None]
    refused = "; ".join(f"not {kind}: {problem}" for kind, problem in problems.items() if problem)
    if not possible:
        raise ServerError(f"refit.transport=auto: {refused}")
    return possible[0], refused or "trainer and servers share this host"


def host_id() -> str:
    """The same for all processes on a host, containers included, and for no others."""
    return _BOOT_ID.read_text().strip()


def is_here(url: str) -> bool:
    """Whether a server's address is one of this host's: the way there then starts where it ends."""
    parts = urlsplit(url)
    address = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_DGRAM)[0][4][0]
    return address_towards([url]) == address


def _planned_problem(infos: Sequence[ServerInfo]) -> str | None:
    for info in infos:
        try:
            server_mesh(info)
        except ServerError as error:
            return str(error)
    return None


def _local_problem(infos: Sequence[ServerInfo], one_host: bool) -> str | None:
    if not one_host:
        return "the trainer's ranks are on several hosts"
    return next((f"{info.url} is on another host" for info in infos if not is_here(info.url)), None)
