"""Command line, environment and port of one SGLang server, as plain data."""

from __future__ import annotations

import errno
import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import megatron_dypo
from megatron_dypo.config.rollout import ServersConfig
from megatron_dypo.config.server_flags import REPLICAS, SPREAD_ATTENTION, spreads_attention, value_of
from megatron_dypo.parallel.doors import LOOPBACK
from megatron_dypo.parallel.environment import NO_WATCHDOG, without_expandable_segments
from megatron_dypo.parallel.interfaces import is_loopback, join_network, listening_address, stay_on_this_host
from megatron_dypo.rollout.proxies import direct_hosts

WEIGHT_LOADER = "megatron_dypo.refit.receiver.load"
"""The function that servers import to receive planned refits."""
_LAUNCHER, _CPU_LAUNCHER = (Path(__file__).with_name(name) for name in ("sglang_keyed.py", "sglang_cpu.py"))
_CPU_MAX_TOTAL_TOKENS = 20_000
_MAX_TMPDIR = 60
_DTYPES = ("float32", "bfloat16")
_HIDDEN = re.compile(
    r"TORCHELASTIC_.*|MASTER_(ADDR|PORT)|ROLE_NAME|((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|.*_(API|STORE)_KEY"
)
"""Variables that a server must not see: torchrun's, and keys."""
_ADDRESS_FLAGS = ("--dist-init-addr", "--nccl-init-addr")
_FIRST_SPREAD_PORT, _SPREAD_PORTS = 10_000, 16
"""Ports of a server whose ranks attend to requests of their own: SGLang takes those from 1 to 6 and 13 after that of
``--dist-init-addr``. Left to itself it takes them near the server's port, where those of two servers overlap. They lie
below the ports that the kernel gives to connections."""


class PortLease:
    """A free TCP port, reserved against other runs on this host until :meth:`release`.

    A server binds its port some ten seconds after it was chosen. In between an abstract Unix socket claims the port;
    the kernel drops the claim with the process.
    """

    def __init__(self, port: int, claim: socket.socket) -> None:
        self.port = port
        self._claim = claim

    def release(self) -> None:
        """Give up the claim."""
        self._claim.close()


def lease_port(host: str, first: int, count: int = 1) -> PortLease:
    """Return the lowest free and unclaimed port from ``first`` upward, or the first of ``count`` such in a row.

    Raises:
        ValueError: no port up to 65535 is free, or ``host`` is no address of this machine.
        OSError: this process may not open a socket there.
    """
    for port in range(first, 65537 - count, count):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0megatron-dypo-port-{port}")
            family, address = listening_address(host)
            for other in range(port, port + count):
                with socket.socket(family) as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind((address, other))
        except OSError as error:
            claim.close()
            if error.errno == errno.EADDRINUSE:
                continue
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                raise ValueError(f"rollout.servers.host={host!r}: {error.strerror}") from error
            raise  # a port below 1024, no descriptors: other ports would fail as well
        return PortLease(port, claim)
    raise ValueError(f"rollout.servers.port={first}: no free port from there up to 65535 on {host}")


def lease_spread_ports(cfg: ServersConfig) -> PortLease | None:
    """Return the first of the ports that the processes of a server need among themselves; None: they need none, or
    ``extra_args`` names them."""
    if spreads_attention(cfg.extra_args) and value_of(cfg.extra_args, *_ADDRESS_FLAGS) is None:
        return lease_port(LOOPBACK, _FIRST_SPREAD_PORT, _SPREAD_PORTS)
    return None


def server_command(
    cfg: ServersConfig,
    *,
    index: int,
    port: int,
    model_path: Path,
    dtype: str,
    seed: int,
    device: str,
    key_file: Path,
    spread_port: int | None = None,
) -> list[str]:
    """Return the command line of server ``index`` of a run, without the API key, which ``ps`` would show.

    SGLang needs no tokenizer, since tokens go in and out. So the model may have any tokenizer that this package reads.

    Args:
        spread_port: see :func:`lease_spread_ports`.

    Raises:
        ValueError: the trainer does not have ``dtype``.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(_DTYPES)}")
    on_cpu = device == "cpu"
    python = cfg.python or sys.executable
    command = [python, str(_CPU_LAUNCHER if on_cpu else _LAUNCHER)]
    command += ["--config", str(key_file), "--model-path", str(model_path), "--host", listening_address(cfg.host)[1]]
    command += ["--port", str(port)]
    command += ["--dtype", dtype, "--tp-size", str(cfg.tensor_parallel), "--random-seed", str(seed + index)]
    command += ["--skip-tokenizer-init", "--log-level-http", "warning", "--custom-weight-loader", WEIGHT_LOADER]
    max_total_tokens = cfg.max_total_tokens
    if on_cpu:
        command += ["--sleep-on-idle", "--skip-server-warmup"]
        max_total_tokens = max_total_tokens or _CPU_MAX_TOTAL_TOKENS
    else:
        command += ["--base-gpu-id", str((cfg.base_gpu or 0) + index * cfg.tensor_parallel)]
    if max_total_tokens is not None:
        command += ["--max-total-tokens", str(max_total_tokens)]
    if spread_port is not None:
        command += ["--dist-init-addr", f"{LOOPBACK}:{spread_port}"]
    if cfg.mem_fraction is not None:
        command += ["--mem-fraction-static", str(cfg.mem_fraction)]
    return [*command, *cfg.extra_args]


def link_package(folder: Path) -> Path:
    """Make a folder for the import path of a server that holds only this package.

    The server may have another interpreter with its own packages, which the trainer's must not hide.
    """
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "megatron_dypo"
    link.unlink(missing_ok=True)
    link.symlink_to(Path(megatron_dypo.__file__).resolve().parent, target_is_directory=True)
    return folder


def server_environment(
    inherited: Mapping[str, str],
    tensor_parallel: int,
    device: str,
    cores: Sequence[int],
    python_path: Path,
    *,
    host: str,
) -> dict[str, str]:
    """Return the environment of a server: the trainer's without torchrun's variables and API keys (a server reads its
    own from a file), plus the variables that rollouts and refits need.

    Args:
        inherited: the trainer's environment. Its values (``OMP_NUM_THREADS``, …) stay, unless correctness depends on
            the variable.
        cores: CPU cores to split among tensor-parallel ranks.
        python_path: see :func:`link_package`.
        host: address of the server. No proxy may be used for it: SGLang warms up by a request to itself. If it is a
            loopback address, so are those of the server's process groups.
    """
    env = {name: value for name, value in inherited.items() if not _HIDDEN.fullmatch(name)}
    if len(env.get("TMPDIR", "")) > _MAX_TMPDIR:
        # SGLang puts its sockets there, and the address of a Unix socket has at most 107 characters.
        env["TMPDIR"] = "/tmp"
    env |= direct_hosts(env, [host])
    if is_loopback(host):
        stay_on_this_host(env)
    else:
        join_network(env)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(python_path), env.get("PYTHONPATH")]))
    # Log-probs at temperature 1, for any sampling temperature.
    env["SGLANG_RETURN_ORIGINAL_LOGPROB"] = "1"
    env["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] = "0"  # else /health generates a token, which takes a second
    env.setdefault("SGLANG_REQUEST_STATE_WAIT_TIMEOUT", "1")  # seconds until a closed connection aborts its request
    env.setdefault("HF_HUB_OFFLINE", "1")
    without_expandable_segments(env)
    if device != "cpu":
        for name, value in NO_WATCHDOG.items():
            env.setdefault(name, value)  # a trainer that is lost, or ends a refit, must not end its servers
    if device == "cpu":
        env.setdefault("OMP_NUM_THREADS", "1")
        env.setdefault("TORCHDYNAMO_DISABLE", "1")
        if tensor_parallel > 1:
            env.setdefault("SGLANG_CPU_OMP_THREADS_BIND", _bind(cores, tensor_parallel))
    return env


def store_environment(command: Sequence[str], folder: Path) -> dict[str, str]:
    """Return the variables with which a server's processes meet in a file. Only this user may enter ``folder``.

    Otherwise SGLang opens a TCP store, which listens on all addresses and asks for no key. For a server on several
    nodes, or with replicas of the whole model, there is no way around it.
    """
    address = str(value_of(command, *_ADDRESS_FLAGS) or f"{LOOPBACK}:0")
    replicas = value_of(command, *REPLICAS) and not value_of(command, SPREAD_ATTENTION)
    is_elsewhere = not is_loopback(address.rpartition(":")[0])
    if replicas or is_elsewhere or value_of(command, "--nnodes") or value_of(command, "--nccl-port"):
        return {}
    return {"SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": f"file://{folder / 'store'}"}


def _bind(cores: Sequence[int], ranks: int) -> str:
    """Return the cores of each rank, such as ``0,1|2,3``; ranks share cores if there are too few."""
    each = max(1, len(cores) // ranks)
    starts = [rank * each % len(cores) for rank in range(ranks)]
    return "|".join(",".join(map(str, cores[start : start + each])) for start in starts)


def available_cores() -> list[int]:
    """Return the CPU cores that this process may use."""
    return sorted(os.sched_getaffinity(0))
