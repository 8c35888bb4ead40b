"""The router in front of the servers, which ``megatron-dypo route`` runs.

It is ``sglang-router``, in this process. Its own launcher (``python -m sglang_router.launch_router``) takes the key on
the command line, where ``ps`` shows it, and imports SGLang, for which a CPU needs shims (see :mod:`.sglang_cpu`).
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
    """Run the router of ``cfg.servers.router`` until SIGTERM; clients need the servers' key to use it.

    It has no server until a trainer names some (:meth:`megatron_dypo.rollout.router.Router.use_servers`), so that no
    request gets to a server whose weights are not known.

    Raises:
        ValueError: the config names no router or one that this host cannot be, the key is not in the environment, or
            ``sglang-router`` is not installed.
    """
    servers = cfg.servers
    if servers.router is None:
        raise ValueError("rollout.servers.router is not set: give the URL that the router is to have")
    api_key = read_api_key(servers.api_key_env)
    if api_key is None:
        raise ValueError(
            f"{servers.api_key_env} is not set: the trainer, the router and every server need the same key"
        )
    if importlib.util.find_spec("sglang_router") is None:
        raise ValueError("rollout.servers.router: needs the package sglang-router, such as sglang-router==0.3.2")
    from sglang_router.router import Router
    from sglang_router.router_args import RouterArgs

    # It would go through a proxy to its servers.
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
        # Requests differ in length, and each has a prompt of its own: the server with the least to do gets the next
        # one, and a common prefix decides between equals. Only this policy counts open requests.
        "policy": "cache_aware",
        "balance_abs_threshold": 0,
        "balance_rel_threshold": 1.0,
        # The trainer decides who serves. A server that rests while the ranks train would fail the router's checks.
        "disable_health_check": True,
        # A dead server has the least to do: after 10 failures it is asked only once a second. A request is tried for
        # longer than that (0.2 + 0.3 + 0.45 + 0.68 s), so that it finds a server that has just come back.
        "cb_timeout_duration_secs": 1,
        "cb_success_threshold": 1,
        "retry_initial_backoff_ms": 200,
        "retry_jitter_factor": 0.0,
        "prometheus_port": 0,  # any free one: the default, 29000, is taken when another router runs on this host
    }


def _address(url: str) -> tuple[str, int]:
    """Return host, as an IP address (names are refused), and port of the router's URL."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or not parts.port or parts.path.strip("/"):
        raise ValueError(f"rollout.servers.router={url!r}: must be http://HOST:PORT")
    try:
        ((*_, address), *_) = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise ValueError(f"rollout.servers.router={url!r}: {error.strerror}") from error
    return str(address[0]), parts.port
