"""A trainer rank's side of planned refits: its links to the ranks of all servers that it sends to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_dypo.parallel import device
from megatron_dypo.refit.checksums import Verify
from megatron_dypo.refit.control import ServerError
from megatron_dypo.refit.deadline import Deadline
from megatron_dypo.refit.plan.plan import RefitPlan, Transfer
from megatron_dypo.refit.receiver import inventory_key
from megatron_dypo.refit.slices import SliceSource
from megatron_dypo.refit.transports.in_threads import run_all
from megatron_dypo.refit.transports.links import LinkError, Sender, ServerLinks
from megatron_dypo.refit.transports.local import LocalSender
from megatron_dypo.refit.transports.messages import Message, cut
from megatron_dypo.refit.transports.p2p import GroupSender
from megatron_dypo.refit.transports.sending import LinkStart

CONNECTORS: dict[str, type[Sender]] = {"p2p": GroupSender, "local": LocalSender}

_FLOATS = (torch.bfloat16, torch.float32, torch.float16)

Link = tuple[int, int]
"""A server, and a tensor-parallel rank of it."""


class SourceRank:
    """What one rank sends; made before a connection, of plan and inventories."""

    def __init__(self, plan: RefitPlan, rank: int, store: dist.Store, urls: Sequence[str], slot_bytes: int) -> None:
        """Reads the inventories from the store.

        Raises:
            ServerError: a server on another kind of device, or whose parameters have other types than the plan's.
        """
        self._plan = plan
        self._rank = rank
        self._store = store
        self._urls = urls
        self._slot_bytes = slot_bytes
        self._dtypes: dict[Link, Mapping[str, torch.dtype]] = {}
        self._messages: dict[Link, list[Message]] = {}
        self._senders: dict[int, Sender] = {}
        transfers: dict[Link, list[Transfer]] = {}
        for transfer in plan.sends(rank):
            transfers.setdefault((transfer.server, transfer.server_rank), []).append(transfer)
        for link, of_link in transfers.items():
            dtypes = self._dtypes[link] = self._read_dtypes(link)
            for transfer in of_link:
                self._require_dtype(transfer, dtypes[transfer.served_name])
            self._messages[link] = list(cut(of_link, dtypes, slot_bytes))

    def connect(self, transport: str, deadline: Deadline) -> None:
        """Meet the ranks of all servers that this rank sends to.

        Raises:
            ServerError: a server did not come.
        """
        for server in sorted({server for server, _ in self._messages}):
            links = ServerLinks(
                store=self._store,
                server=server,
                sources=self._plan.sources_of(server),
                num_server_ranks=self._plan.servers[server].tensor,
                slot_bytes=self._slot_bytes,
            )
            try:
                self._senders[server] = CONNECTORS[transport].connect(links, self._rank, deadline)
            except LinkError as error:
                raise ServerError(f"{self._urls[server]}: no connection: {error}", self._urls[server]) from error

    def send(self, slices: SliceSource, version: int, verify: Verify, deadline: Deadline) -> int:
        """Send everything; returns the bytes.

        Raises:
            ServerError: names every server that was lost.
        """
        starts = {
            (server, server_rank): LinkStart(
                slices,
                self._senders[server].outgoing(server_rank, deadline),
                messages,
                self._dtypes[server, server_rank],
                version=version,
                verify=verify,
                slot_bytes=self._slot_bytes,
            )
            for (server, server_rank), messages in self._messages.items()
        }
        errors = run_all([start.send for start in starts.values()])
        device.synchronize()
        self._raise({link: error for link, error in zip(starts, errors, strict=True) if error is not None})
        return sum(start.num_bytes for start in starts.values())

    def close(self) -> None:
        for sender in self._senders.values():
            sender.close()
        self._senders.clear()

    def _raise(self, errors: Mapping[Link, BaseException]) -> None:
        ours = [error for error in errors.values() if not isinstance(error, LinkError)]
        if ours:
            raise ours[0]
        if errors:
            lost = {
                f"{self._urls[server]}: rank {server_rank}: {error}" for (server, server_rank), error in errors.items()
            }
            raise ServerError("; ".join(sorted(lost)), *{self._urls[server] for server, _ in errors})

    def _require_dtype(self, transfer: Transfer, dtype: torch.dtype) -> None:
        """Quantised weights and their scales arrive as they are; others may be rounded on their way."""
        is_quantized = self._plan.encoding.is_quantized(transfer.hf_name)
        wanted = (torch.float8_e4m3fn,) if is_quantized else (torch.float32,) if transfer.part == "scale" else _FLOATS
        if dtype not in wanted:
            url, encoding = self._urls[transfer.server], self._plan.encoding.quantization
            raise ServerError(
                f"{url}: {transfer.served_name} is {dtype}: refit.quantize={encoding} sends {wanted[0]}", url
            )

    def _read_dtypes(self, link: Link) -> dict[str, torch.dtype]:
        inventory = json.loads(self._store.get(inventory_key(*link)))
        url, kind = self._urls[link[0]], inventory["device"]
        if kind != device.device_kind():
            raise ServerError(f"{url}: serves on device={kind!r}, the trainer is on {device.device_kind()!r}", url)
        return {name: getattr(torch, dtype) for name, (_, dtype) in inventory["parameters"].items()}
