"""SGLang servers: started, health-checked and stopped by the run, or given by URL."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import platform
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from megatron_dypo.config.rollout import ServersConfig
from megatron_dypo.config.server_flags import ROUTES_FLAG, ROUTES_SETTING, SEEDS_SETTING
from megatron_dypo.ending import Cause
from megatron_dypo.parallel.environment import set_kernel_cache
from megatron_dypo.processes.running_time import running_time
from megatron_dypo.rollout.keys import read_api_key
from megatron_dypo.rollout.server.command import (
    available_cores,
    lease_port,
    lease_spread_ports,
    link_package,
    server_command,
    server_environment,
)
from megatron_dypo.rollout.server.names import require_known_hosts
from megatron_dypo.rollout.server.probe import HEALTH_EVERY_S, http_status, log_probs_are_untempered, server_setting
from megatron_dypo.rollout.server.process import ServerDiedError, ServerProcess
from megatron_dypo.rollout.server.reach import find_unreachable
from megatron_dypo.rollout.server.supervise import Supervised, Supervisor

_log = logging.getLogger(__name__)
_TELL_EVERY_S = 60.0
"""Seconds between two lines that name the server that is waited for."""
_REACH_S = 60.0
"""Seconds within which the host of each given URL must answer, if only by refusing a connection."""


class NotHealthyError(TimeoutError):
    """A server did not become healthy in time."""

    cause = Cause.SERVERS_GONE


class ServerPool:
    """The servers of a run; leaving the context stops those that the run started.

    They also stop if this process dies in any way. A server that dies is started again at the same port.
    """

    def __init__(self, urls: Sequence[str], api_key: str | None, *, urls_are_restarted: bool = False) -> None:
        self.urls = tuple(url.rstrip("/") for url in urls)
        self.api_key = api_key
        self.urls_are_restarted = urls_are_restarted
        self._on_stop = contextlib.ExitStack()
        self._processes: list[ServerProcess] = []
        self._starts: list[Callable[[], None]] = []
        self._supervisor: Supervisor | None = None

    def check(self) -> None:
        """Check the started servers, and start dead ones again. It is cheap and sends nothing to running servers.

        Raises:
            ServerDiedError: one died and ``max_restarts`` is 0, or all died and none is started again; the message
                quotes their logs.
        """
        if self._supervisor is not None:
            self._supervisor.check()
            return
        for process in self._processes:  # they start for the first time
            process.check()

    def wait_for_loss(self) -> None:
        """Wait until :meth:`check` raises, and raise its error. Call it only if this pool has started its servers."""
        assert self._supervisor is not None
        self._supervisor.wait_for_loss()

    def take_lost(self) -> dict[str, str]:
        """Return URL → reason for the servers that died since the last call; most of them run again, or soon will.

        Raises:
            ServerDiedError: as :meth:`check` does.
        """
        self.check()
        servers = self._supervisor.servers if self._supervisor else ()
        deaths = {server.process.url: server.take_death() for server in servers}
        return {url: death for url, death in deaths.items() if death is not None}

    def find_stopped(self) -> dict[str, str]:
        """Return URL → process for the started servers of which a signal has stopped a process."""
        found = {process.url: process.stopped_process() for process in self._processes}
        return {url: stopped for url, stopped in found.items() if stopped is not None}

    def stacks_of(self, url: str) -> str:
        """Return the stacks of a started server's processes by py-spy; "" for other servers, and without py-spy."""
        return "".join(process.stacks() for process in self._processes if process.url == url)

    def end(self, url: str) -> bool:
        """End a started server that hangs; return whether this pool has started it. It is then supervised as if it had
        died."""
        own = [process for process in self._processes if process.url == url]
        for process in own:
            process.stop()
        return bool(own)

    def may_return(self) -> bool:
        """Return whether a server that does not answer may come back on its own."""
        if self._supervisor is None:
            return self.urls_are_restarted
        return any(server.given_up is None for server in self._supervisor.servers)

    def honours_seeds(self) -> bool:
        """Return whether a server samples each request with the seed that it names."""
        return any(server_setting(url, self.api_key, SEEDS_SETTING) is True for url in self.urls)

    def stop(self) -> None:
        """Stop started servers: SIGTERM, then SIGKILL to the process group after a grace period. Idempotent."""
        if self._supervisor is not None:
            self._supervisor.stop()
            self._supervisor = None
        stopping, self._processes = self._processes, []
        for process in stopping:
            process.stop()
        for process in stopping:
            process.join()
        self._on_stop.close()

    def __enter__(self) -> ServerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self, cfg: ServersConfig, model_path: Path, dtype: str, log_dir: Path, seed: int, device: str) -> None:
        python_path = link_package(log_dir / "python_path")
        env = server_environment(os.environ, cfg.tensor_parallel, device, available_cores(), python_path, host=cfg.host)
        set_kernel_cache(env)
        for index in range(cfg.per_node):
            lease = lease_port(cfg.host, cfg.port)
            self._on_stop.callback(lease.release)
            spread = lease_spread_ports(cfg)
            if spread is not None:
                self._on_stop.callback(spread.release)
            url = f"http://{f'[{cfg.host}]' if ':' in cfg.host else cfg.host}:{lease.port}"
            log_path = log_dir / f"sglang_{index}.log"
            process = ServerProcess(f"SGLang server {index}", url, log_path, grace_s=cfg.stop_grace_s)
            command = server_command(
                cfg,
                index=index,
                port=lease.port,
                model_path=model_path,
                dtype=dtype,
                seed=seed,
                device=device,
                key_file=process.key_file,
                spread_port=spread.port if spread else None,
            )
            assert self.api_key is not None
            start = functools.partial(process.start, command, env, self.api_key)
            start()
            self._processes.append(process)
            self._starts.append(start)
            self.urls += (url,)
            _log.info("starting %s at %s, log %s", process.name, url, process.log_path)

    def _wait_healthy(self, deadline_s: float, key_name: str) -> None:
        """Wait until all servers are healthy at once: one that was may end while another one starts."""
        begin = told = running_time()
        has_waited = True
        while has_waited:
            has_waited = False
            for url in self.urls:
                while (status := http_status(f"{url}/health", self.api_key)) != 200:
                    has_waited = True
                    self._check_start()
                    now, said = running_time(), "no answer" if status is None else f"/health answers HTTP {status}"
                    if now - begin > deadline_s:
                        raise NotHealthyError(f"SGLang server {url} is not healthy after {deadline_s:g} s: {said}")
                    if now - told > _TELL_EVERY_S:
                        told, waited_s = now, now - begin
                        _log.info("waiting for SGLang server %s for %.0f of %g s: %s", url, waited_s, deadline_s, said)
                    time.sleep(HEALTH_EVERY_S)
                if not self._processes:
                    _require_sglang(url, self.api_key, key_name)
                self._forget_key(url)

    def _forget_key(self, url: str) -> None:
        """Remove the key of a server that has read it. One that starts again gets a new file."""
        for process in self._processes:
            if process.url == url:
                process.forget_key()

    def _check_start(self) -> None:
        self.check()
        for server in self._supervisor.servers if self._supervisor else ():
            if server.given_up is not None:
                raise ServerDiedError(server.given_up)

    def _supervise(self, restarts: int, deadline_s: float) -> None:
        if self._supervisor is not None or not self._processes:
            return
        self._supervisor = Supervisor(
            [
                Supervised(
                    process,
                    start,
                    functools.partial(self._is_healthy, process),
                    restarts=restarts,
                    deadline_s=deadline_s,
                )
                for process, start in zip(self._processes, self._starts, strict=True)
            ],
            needs_all=not restarts,
        )

    def _is_healthy(self, process: ServerProcess) -> bool:
        """Return whether a restarted server is up; if so, remove its key from the disk."""
        if http_status(f"{process.url}/health", self.api_key) != 200:
            return False
        self._forget_key(process.url)
        return True


def start_servers(
    cfg: ServersConfig,
    model_path: Path,
    dtype: str,
    log_dir: Path,
    *,
    seed: int,
    device: str,
    temperature: float = 1.0,
    returns_routes: bool = False,
    have_worked: bool = False,
) -> ServerPool:
    """Start ``cfg.per_node`` servers, or reach those of ``cfg.urls``, and return when all are healthy.

    Server ``i`` logs to ``log_dir/sglang_<i>.log`` and samples with ``seed + i``, since SGLang has no seed for each
    request.

    Args:
        device: ``cpu``, or the accelerator, which SGLang finds on its own.
        temperature: temperature of training rollouts. If it is not 1, servers given by URL are tested: their log-probs
            must be those of temperature 1.
        returns_routes: servers given by URL must be able to return the experts that they choose.
        have_worked: the run has got further with its servers before, so that one which ends while it starts was hit by
            something else: it is started again, up to ``cfg.max_restarts`` times. Otherwise it cannot start.

    Raises:
        ServerDiedError: a server ended while it started, and is not started again.
        NotHealthyError: a server is not healthy after ``cfg.start_deadline_s``, or the host of a URL does not answer.
        ValueError: a server of ``cfg.urls`` has a name that this host does not know, refuses the API key, gives
            log-probs that depend on the temperature, or lacks a flag; ``dtype``, ``cfg.port`` or the key breaks a rule;
            or ``cfg.nodes`` is above 1 without ``cfg.urls``.
    """
    if not cfg.urls and cfg.nodes > 1:
        raise ValueError(
            f"rollout.servers.nodes={cfg.nodes}: a run starts servers on its own node only: set it to 1, or start the "
            "servers of the other nodes (slurm/, or `megatron-dypo serve` on each) and give their rollout.servers.urls"
        )
    given_key = read_api_key(cfg.api_key_env)
    pool = ServerPool(
        cfg.urls,
        given_key if cfg.urls else given_key or secrets.token_hex(16),
        urls_are_restarted=cfg.urls_are_restarted,
    )
    with contextlib.ExitStack() as undo:
        undo.callback(pool.stop)
        require_known_hosts(cfg.urls)
        _require_reachable(cfg)
        if not cfg.urls:
            log_dir.mkdir(parents=True, exist_ok=True)
            pool._start(cfg, model_path.resolve(), dtype, log_dir.resolve(), seed, device)
        if have_worked:
            pool._supervise(cfg.max_restarts, cfg.start_deadline_s)
        pool._wait_healthy(cfg.start_deadline_s, cfg.api_key_env)
        if cfg.urls and temperature != 1.0:
            _require_untempered(pool, temperature)
        if cfg.urls and returns_routes:
            _require_routes(pool)
        pool._supervise(cfg.max_restarts, cfg.start_deadline_s)
        pool.take_lost()  # they run again
        undo.pop_all()
    return pool


def _require_reachable(cfg: ServersConfig) -> None:
    seconds = min(_REACH_S, cfg.start_deadline_s)
    lost = find_unreachable(cfg.urls, seconds)
    if not lost:
        return
    url, met = next(iter(lost.items()))
    more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
    raise NotHealthyError(
        f"rollout.servers.urls: {url}{more}: {platform.node()} could not connect for {seconds:g} s ({met}). A host "
        "that lives refuses connections while its server starts: this one is down, or a firewall stops them"
    )


def _require_sglang(url: str, api_key: str | None, key_name: str) -> None:
    """Require that a given URL is that of a server which accepts the key."""
    status = http_status(f"{url}/model_info", api_key)
    if status in (401, 403):
        raise ValueError(f"{url} refuses the API key: set {key_name} to the key of the servers")
    if status not in (200, None):  # None: it has just died, which the first refit will notice
        raise ValueError(f"{url}/model_info: HTTP {status}: this is not an SGLang server")


def _require_untempered(pool: ServerPool, temperature: float) -> None:
    for url in pool.urls:
        if not log_probs_are_untempered(url, pool.api_key):
            raise ValueError(
                f"temperature={temperature}: log-probs of {url} depend on it, but must be those of temperature 1: "
                "start the server with SGLANG_RETURN_ORIGINAL_LOGPROB=1"
            )


def _require_routes(pool: ServerPool) -> None:
    for url in pool.urls:
        if server_setting(url, pool.api_key, ROUTES_SETTING) is not True:
            raise ValueError(
                f"objective.replay=rollout: {url} cannot return the experts that it chooses: start it with "
                f"{ROUTES_FLAG}"
            )
