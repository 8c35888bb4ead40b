"""The servers of one node for a trainer on other nodes. ``megatron-dypo serve`` runs this."""

from __future__ import annotations

import contextlib
import logging
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_dypo.config.rollout import ServersConfig
from megatron_dypo.config.tree import Config
from megatron_dypo.rollout.keys import read_api_key
from megatron_dypo.rollout.server.command import lease_port
from megatron_dypo.rollout.server.servers import ServerPool, start_servers
from megatron_dypo.rollout.server.watch import ServerWatch

log = logging.getLogger(__name__)


def keep_servers(
    config: Config, *, device: str, first: int, log_dir: Path, server_args: str = "", have_worked: bool = False
) -> None:
    """Keep ``rollout.servers.per_node`` servers at ``rollout.servers.port`` and the ports after it, until SIGTERM.

    A server that dies is started again, up to ``rollout.servers.max_restarts`` times in a row, with the weights of the
    model folder. The trainer then brings it the current weights. One that is stopped or does not answer is named after
    30 s, and ended after ``run.watchdog_s``, as if it had died.

    Args:
        first: number of this node's first server among the servers of all nodes; server ``i`` samples with seed +
        ``i``.
        server_args: more arguments for SGLang, after ``rollout.servers.extra_args``, as a shell would read them.
        have_worked: as for :func:`~megatron_dypo.rollout.server.servers.start_servers`.

    Raises:
        ServerDiedError: no server is left; or, with ``max_restarts=0``, one died.
        TimeoutError: a server is not healthy in time.
        ValueError: no API key in the environment, or a port is taken.
    """
    cfg = config.servers
    if read_api_key(cfg.api_key_env) is None:
        raise ValueError(f"{cfg.api_key_env} is not set: the trainer and every server need the same key")
    # Only this node's servers; other nodes have their own.
    cfg = replace(cfg, urls=(), urls_are_restarted=False, router=None, nodes=1)
    cfg = replace(cfg, extra_args=(*cfg.extra_args, *shlex.split(server_args)))
    _require_ports(cfg)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    model, seed = Path(config.model.hf_path), config.run.seed + first
    with start_servers(
        cfg, model, config.model.dtype, log_dir, seed=seed, device=device, have_worked=have_worked
    ) as pool:
        log.info("serving at %s", ", ".join(pool.urls))
        with watching(pool, pool.urls, lambda text: log.warning("%s", text), config.run.watchdog_s):
            pool.wait_for_loss()


def watching(
    pool: ServerPool, urls: Sequence[str], warn: Callable[[str], None], watchdog_s: float
) -> contextlib.AbstractContextManager[object]:
    """Watch the servers at ``urls`` inside the block, and end those of ``pool`` that hang for ``watchdog_s``. 0: do
    neither."""
    if not watchdog_s:
        return contextlib.nullcontext()
    return ServerWatch(
        urls,
        pool.api_key,
        warn,
        find_stopped=pool.find_stopped,
        stacks_of=pool.stacks_of,
        end=pool.end,
        ends_s=watchdog_s,
    )


def _require_ports(cfg: ServersConfig) -> None:
    """Raise ValueError if a port is taken. The trainer expects exactly these ports."""
    for port in range(cfg.port, cfg.port + cfg.per_node):
        lease = lease_port(cfg.host, port)
        lease.release()
        if lease.port != port:
            raise ValueError(f"port {port} of {cfg.host} is taken: end what listens there, or set rollout.servers.port")
