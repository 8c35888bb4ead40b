"""The router in front of the servers. ``megatron-dypo route`` runs it.

It is ``sglang-router``, in a process of its own at a loopback address, behind an
:class:`~megatron_dypo.rollout.server.http_door.HttpDoor`. Its own launcher (``python -m sglang_router.launch_router``)
is not used: it takes the key on the command line, where ``ps`` shows it, and imports SGLang, for which a CPU needs
shims (see :mod:`.sglang_cpu`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import signal
import socket
import subprocess
import sys
import urllib.parse
from typing import Any

from megatron_dypo.config.rollout import RolloutConfig
from megatron_dypo.config.urls import url_host
from megatron_dypo.parallel.doors import LOOPBACK
from megatron_dypo.processes.children import program
from megatron_dypo.rollout.keys import read_api_key
from megatron_dypo.rollout.proxies import direct_hosts
from megatron_dypo.rollout.server.command import lease_port
from megatron_dypo.rollout.server.http_door import HttpDoor

_FIRST_INNER_PORT = 9_500
_UNREACHABLE = "255.255.255.255"
"""An address at which a process can listen, and to which no TCP connection can be made. The router cannot be told to
serve no metrics, for which it asks for no key."""
_GRACE_S = 5.0
"""Seconds beyond ``stop_grace_s`` in which a router that was told to stop must have ended."""


def run_router(cfg: RolloutConfig) -> None:
    """Run the router of ``cfg.servers.router`` until SIGTERM. Clients need the servers' key to use it.

    It has no server until a trainer names some (:meth:`megatron_dypo.rollout.router.Router.use_servers`), so no request
    reaches a server with unknown weights.

    Raises:
        ValueError: the config names no router, or one at which this host cannot listen; the key is not in the
            environment; or ``sglang-router`` is not installed.
        SystemExit: the router ended on its own.
    """
    servers = cfg.servers
    if servers.router is None:
        raise ValueError("rollout.servers.router is not set: set it to the URL of the router")
    api_key = read_api_key(servers.api_key_env)
    if api_key is None:
        raise ValueError(
            f"{servers.api_key_env} is not set: the trainer, the router and every server need the same key"
        )
    if importlib.util.find_spec("sglang_router") is None:
        raise ValueError("rollout.servers.router: needs the package sglang-router, such as sglang-router==0.3.2")
    host, port = address_of(servers.router)
    lease = lease_port(LOOPBACK, _FIRST_INNER_PORT)
    try:
        door = HttpDoor(host, port, api_key, lease.port)
    except OSError as error:
        raise ValueError(f"rollout.servers.router={servers.router!r}: {error.strerror}") from error
    status = _run_behind(router_options(cfg, lease.port, api_key), [url_host(url) for url in servers.urls])
    door.close()
    lease.release()
    if status:
        raise SystemExit(status)


def _run_behind(options: dict[str, Any], hosts: list[str]) -> int:
    """Run the router's own process until it ends, or a signal asks to stop; return its status, 0 if it was asked."""
    inner = program("megatron_dypo.rollout.server.run_router:run_inner")
    grace_s = options["shutdown_grace_period_secs"] + _GRACE_S
    guard = subprocess.Popen(
        program("megatron_dypo.processes.guard:main", os.getpid(), grace_s, *inner, isolated=True),
        stdin=subprocess.PIPE,
        env={**os.environ, **direct_hosts(os.environ, hosts)},  # else it would reach its servers through a proxy
        start_new_session=True,
    )
    asked: list[int] = []

    def stop(number: int, _: object) -> None:
        asked.append(number)
        guard.terminate()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    assert guard.stdin is not None
    with contextlib.suppress(BrokenPipeError), guard.stdin as stdin:
        stdin.write(json.dumps(options).encode())
    status = guard.wait()
    return 0 if asked else status


def run_inner() -> None:
    """Run ``sglang-router`` in this process, with the options of the standard input."""
    from sglang_router.router import Router
    from sglang_router.router_args import RouterArgs

    Router.from_args(RouterArgs(**json.load(sys.stdin))).start()


def router_options(cfg: RolloutConfig, port: int, api_key: str) -> dict[str, Any]:
    """Return the fields of ``RouterArgs`` (sglang-router 0.3.2) for a router at a port of a loopback address."""
    return {
        "host": LOOPBACK,
        "port": port,
        "api_key": api_key,
        "log_level": "warn",  # else two lines for each request
        "request_timeout_secs": math.ceil(cfg.request_deadline_s),
        "shutdown_grace_period_secs": math.ceil(cfg.servers.stop_grace_s),
        # Requests differ in length and have different prompts. With this policy the server with the fewest open
        # requests gets the next one, and a common prefix decides between equals. No other policy counts open requests.
        "policy": "cache_aware",
        "balance_abs_threshold": 0,
        "balance_rel_threshold": 1.0,
        # The trainer decides which servers serve. A server that is paused during training would fail health checks.
        "disable_health_check": True,
        # A dead server has the fewest open requests. After 10 failures it gets only one request a second. A request is
        # retried for longer than that (0.2 + 0.3 + 0.45 + 0.68 s), so that it finds a server that has just come back.
        "cb_timeout_duration_secs": 1,
        "cb_success_threshold": 1,
        "retry_initial_backoff_ms": 200,
        "retry_jitter_factor": 0.0,
        "prometheus_host": _UNREACHABLE,
        "prometheus_port": port,
    }


def address_of(url: str) -> tuple[str, int]:
    """Return host and port of the router's URL, the host as an IP address."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or not parts.port or parts.path.strip("/"):
        raise ValueError(f"rollout.servers.router={url!r}: must be http://HOST:PORT")
    try:
        ((*_, address), *_) = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise ValueError(f"rollout.servers.router={url!r}: {error.strerror}") from error
    return str(address[0]), parts.port
