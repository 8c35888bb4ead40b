"""The router in front of the servers. ``megatron-dypo route`` runs it.

It is ``sglang-router``, in this process. Its own launcher (``python -m sglang_router.launch_router``) is not used: it
takes the key on the command line, where ``ps`` shows it, and imports SGLang, for which a CPU needs shims (see
:mod:`.sglang_cpu`).
"""

from __future__ import annotations

import importlib.util
import math
import os
import socket
import urllib.parse
from typing import Any

from megatron_dypo.config.rollout import RolloutConfig
from megatron_dypo.config.urls import url_host
from megatron_dypo.rollout.keys import read_api_key
from megatron_dypo.rollout.proxies import direct_hosts


def run_router(cfg: RolloutConfig) -> None:
    """Run the router of ``cfg.servers.router`` until SIGTERM. Clients need the servers' key to use it.

    It has no server until a trainer names some (:meth:`megatron_dypo.rollout.router.Router.use_servers`), so no request
    reaches a server with unknown weights.

    Raises:
        ValueError: the config names no router, or one with an address that this host does not have; the key is not in
            the environment; or ``sglang-router`` is not installed.
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
    from sglang_router.router import Router
    from sglang_router.router_args import RouterArgs

    # Otherwise it would reach its servers through a proxy.
    os.environ.update(direct_hosts(os.environ, [url_host(url) for url in servers.urls]))
    Router.from_args(RouterArgs(**router_options(cfg, servers.router, api_key))).start()


def router_options(cfg: RolloutConfig, url: str, api_key: str) -> dict[str, Any]:
    """Return the fields of ``RouterArgs`` (sglang-router 0.3.2) for a router at ``url``."""
    host, port = _address(url)
    return {
        "host": host,
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
        "prometheus_port": 0,  # any free port: another router on this host may use the default, 29000
    }


def _address(url: str) -> tuple[str, int]:
    """Return host and port of the router's URL, the host as an IP address (the router refuses names)."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or not parts.port or parts.path.strip("/"):
        raise ValueError(f"rollout.servers.router={url!r}: must be http://HOST:PORT")
    try:
        ((*_, address), *_) = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise ValueError(f"rollout.servers.router={url!r}: {error.strerror}") from error
    return str(address[0]), parts.port
