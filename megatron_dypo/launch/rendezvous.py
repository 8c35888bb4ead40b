"""torchrun's rendezvous without a store that other hosts reach without a key.

torchrun's own rendezvous (static and c10d) makes a TCP store that listens on all addresses. Here the first node's
launcher serves a store on a loopback address, and through a door with a key if there are several nodes. The launchers
of the other nodes reach it through a tunnel. Ranks connect to a loopback address of their node.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import os
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from torch.distributed import PrefixStore, Store
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.run import parse_args

from megatron_dypo.parallel.doors import LOOPBACK, Tunnel
from megatron_dypo.parallel.interfaces import listening_address
from megatron_dypo.parallel.stores import ServedStore, StoreAddress, reach_store

KEY_VARIABLE = "MEGATRON_DYPO_STORE_KEY"
"""Environment variable: the key of the store of a run on several nodes, the same on every node."""
_BACKEND = "megatron_dypo"
_DEFAULT_PORT = 29500
"""torchrun's default of --master-port."""
_TIMEOUT_S = 600
"""torchrun's default of timeout in --rdzv-conf: longest wait of a node for the others, in seconds."""
_KEY = re.compile(r"[!-~]{16,}")


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """The facts about a start of the run that torchrun's arguments tell."""

    arguments: argparse.Namespace
    """torchrun's arguments, with the rendezvous of this module in place of its own."""
    attempt: str
    """Name of this start of the run, the same on all nodes."""
    has_first_rank: bool
    """Whether the launcher of this node starts rank 0."""


def read_meeting(words: Sequence[str]) -> Meeting:
    """Read torchrun's arguments. Remove the key from the environment, since ranks need none.

    Raises:
        ValueError: several nodes without a key, or with a rendezvous backend that has none.
    """
    args = parse_args(list(words))
    key = os.environ.pop(KEY_VARIABLE, "")
    if args.standalone or args.nnodes in ("1", "1:1"):
        return Meeting(
            arguments=_with_ours(args, f"{LOOPBACK}:0", 0, ""), attempt=uuid.uuid4().hex, has_first_rank=True
        )
    if args.rdzv_backend != "static":
        raise ValueError(
            f"--rdzv-backend={args.rdzv_backend}: its store asks for no key: give --master-addr, --master-port and "
            "--node-rank instead"
        )
    if not _KEY.fullmatch(key):
        raise ValueError(
            f"{KEY_VARIABLE}: several nodes need the same key of at least 16 printable characters in their "
            "environment, such as the output of `openssl rand -hex 16`"
        )
    endpoint = args.rdzv_endpoint or f"{args.master_addr}:{args.master_port or _DEFAULT_PORT}"
    slurm = f"{os.environ.get('SLURM_JOB_ID', '')}.{os.environ.get('SLURM_RESTART_COUNT', '')}"
    return Meeting(
        attempt=f"{endpoint}/{args.rdzv_id} {slurm}".strip(" ."),
        has_first_rank=args.node_rank == 0,
        arguments=_with_ours(args, endpoint, args.node_rank, key),
    )


def _with_ours(args: argparse.Namespace, endpoint: str, rank: int, key: str) -> argparse.Namespace:
    """Return torchrun's arguments with our rendezvous."""
    _register()
    _keys[endpoint] = key
    conf = f"{args.rdzv_conf},rank={rank}".strip(",")
    ours = {"standalone": False, "rdzv_backend": _BACKEND, "rdzv_endpoint": endpoint, "rdzv_conf": conf}
    return argparse.Namespace(**{**vars(args), **ours})


_keys: dict[str, str] = {}
"""Endpoint → key. torchrun writes a handler's other arguments to its log."""


@functools.cache
def _register() -> None:
    rendezvous_handler_registry.register(_BACKEND, _make)


def _make(parameters: RendezvousParameters) -> RendezvousHandler:
    host, _, port = parameters.endpoint.rpartition(":")
    return _Rendezvous(
        StoreAddress(host=host.strip("[]"), port=int(port), key=_keys[parameters.endpoint]),
        rank=int(parameters.config["rank"]),
        num_nodes=parameters.max_nodes,
        run_id=parameters.run_id,
        timeout=datetime.timedelta(seconds=int(parameters.config.get("timeout", _TIMEOUT_S))),
    )


class _Rendezvous(RendezvousHandler):
    """The meeting of a fixed number of launchers, whose numbers are given."""

    def __init__(
        self, address: StoreAddress, *, rank: int, num_nodes: int, run_id: str, timeout: datetime.timedelta
    ) -> None:
        self._address, self._rank, self._num_nodes, self._run_id = address, rank, num_nodes, run_id
        self._timeout = timeout
        self._store: Store | None = None
        self._port = 0
        self._served: ServedStore | None = None
        self._tunnel: Tunnel | None = None

    @property
    def use_agent_store(self) -> bool:
        """Whether ranks meet on this store too."""
        return True

    def get_backend(self) -> str:
        """Return the name that torchrun shows."""
        return _BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        """Serve the store, or reach it; return what the launcher and its ranks need of it."""
        if self._store is None:
            self._store = self._serve() if self._rank == 0 else self._reach()
        here = RendezvousStoreInfo(LOOPBACK, self._port)
        return RendezvousInfo(PrefixStore(self._run_id, self._store), self._rank, self._num_nodes, here)

    def is_closed(self) -> bool:
        """Return False: nobody can close it early."""
        return False

    def set_closed(self) -> None:
        """Do nothing."""

    def num_nodes_waiting(self) -> int:
        """Return 0: no node joins later."""
        return 0

    def get_run_id(self) -> str:
        """Return torchrun's --rdzv-id."""
        return self._run_id

    def shutdown(self) -> bool:
        """Keep the store, which other nodes may still read; it ends with this process."""
        return True

    def _serve(self) -> Store:
        address = self._address
        host = listening_address(address.host)[1] if address.key else LOOPBACK
        self._served = ServedStore(host, self._timeout, port=address.port, key=address.key)
        self._port = self._served.store.port
        return self._served.store

    def _reach(self) -> Store:
        address = self._address
        self._tunnel = Tunnel(address.host, address.port, address.key, patience_s=self._timeout.total_seconds())
        self._port = self._tunnel.port
        return reach_store(StoreAddress(host=LOOPBACK, port=self._port), self._timeout)
