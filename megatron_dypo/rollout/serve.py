"""The servers of one node, kept alive for a trainer elsewhere: what ``megatron-dypo serve`` runs."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from megatron_dypo.config import Config, ServersConfig
from megatron_dypo.rollout.launch import available_cores, lease_port, server_command, server_environment
from megatron_dypo.rollout.probe import http_status
from megatron_dypo.rollout.process import ServerDiedError, ServerProcess

_POLL_S = 0.5

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class KeptServer:
    """A server at a fixed port that is started again when it dies.

    It starts with the weights of the model folder each time; bringing it up to date is the trainer's affair.
    """

    name: str
    url: str
    log_dir: Path
    api_key: str
    command: Callable[[Path], Sequence[str]]
    """Key file → command line."""
    env: Mapping[str, str]
    restarts: int
    """Starts after the first, at most."""
    _starts: int = 0
    _is_healthy: bool = False
    _process: ServerProcess = field(init=False)

    def start(self) -> None:
        log_file = self.log_dir / f"sglang_{self.name}_start{self._starts}.log"
        self._process = ServerProcess(f"SGLang server {self.name}", self.url, log_file)
        self._is_healthy = False
        self._starts += 1
        self._process.start(self.command(self._process.key_file), self.env, self.api_key)
        log.info("starting %s at %s, log %s", self._process.name, self.url, log_file)

    def look_after(self) -> None:
        """Start the server again if it died; note when it is healthy.

        Raises:
            ServerDiedError: it has died once too often.
        """
        try:
            self._process.check()
        except ServerDiedError as error:
            self._process.forget_key(self.api_key)
            if self._starts > self.restarts:
                raise ServerDiedError(f"{error}\nit is not started again after {self._starts} starts") from error
            log.warning("%s", error)
            self.start()
            return
        if not self._is_healthy and http_status(f"{self.url}/health", self.api_key) == 200:
            self._is_healthy = True
            self._process.forget_key(self.api_key)
            log.info("%s is healthy", self._process.name)

    def stop(self) -> None:
        self._process.stop()

    def join(self) -> None:
        self._process.join()
        self._process.forget_key(self.api_key)


def serve(
    config: Config, *, device: str, name: str, first: int, restarts: int, log_dir: Path, engine_args: str = ""
) -> None:
    """Keep ``rollout.servers.count`` servers at ``rollout.servers.port`` and the ports after it, until SIGTERM.

    Args:
        name: of this node, in names of servers and of their logs.
        first: number of this node's first server among those of all nodes; server ``i`` samples with seed + ``i``.
        engine_args: more arguments for SGLang, after ``rollout.servers.extra_args``, as a shell would read them.

    Raises:
        ServerDiedError: a server has died more than ``restarts`` times.
        ValueError: no API key in the environment, or a port is taken.
    """
    cfg = config.rollout.servers
    if not os.environ.get(cfg.api_key_env):
        raise ValueError(f"{cfg.api_key_env} is not set: the trainer and every server need the same key")
    cfg = replace(cfg, extra_args=(*cfg.extra_args, *shlex.split(engine_args)))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    log_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as leases:
        for index in range(cfg.count):
            leases.callback(_lease_exactly(cfg, cfg.port + index))
        servers = [
            KeptServer(
                name=f"{name}_{index}",
                url=f"http://{f'[{cfg.host}]' if ':' in cfg.host else cfg.host}:{cfg.port + index}",
                log_dir=log_dir,
                api_key=os.environ[cfg.api_key_env],
                command=partial(_command, config, cfg, index, first, device),
                env=server_environment(os.environ, cfg.tensor_parallel, device, available_cores()),
                restarts=restarts,
            )
            for index in range(cfg.count)
        ]
        with _started(servers):
            while True:
                for server in servers:
                    server.look_after()
                time.sleep(_POLL_S)


def _lease_exactly(cfg: ServersConfig, port: int) -> Callable[[], None]:
    """Claim a port that the trainer was told, and that therefore cannot be another; gives what releases it."""
    lease = lease_port(cfg.host, port)
    if lease.port != port:
        lease.release()
        raise ValueError(f"port {port} of {cfg.host} is taken: end what listens there, or set rollout.servers.port")
    return lease.release


def _command(config: Config, cfg: ServersConfig, index: int, first: int, device: str, key_file: Path) -> list[str]:
    return server_command(
        cfg,
        index=index,
        port=cfg.port + index,
        model_path=Path(config.model.hf_path).resolve(),
        dtype=config.model.dtype,
        seed=config.run.seed + first,
        device=device,
        key_file=key_file,
    )


@contextlib.contextmanager
def _started(servers: Sequence[KeptServer]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for server in servers:
            server.start()
            stack.callback(server.join)
        for server in servers:  # all are told to stop before any is waited for
            stack.callback(server.stop)
        yield
