"""A trainer rank's side of a planned connection: its links to the server ranks that it sends to."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_dypo.parallel import device
from megatron_dypo.refit.answers import ServerError
from megatron_dypo.refit.control_message import ControlMessage, inventory_key
from megatron_dypo.refit.deadline import Deadline
from megatron_dypo.refit.plan.refit_plan import Transfer
from megatron_dypo.refit.quantized_servers import refusal
from megatron_dypo.refit.slices import SliceSource
from megatron_dypo.refit.transports.ends import sender_of
from megatron_dypo.refit.transports.link_sender import LinkSender
from megatron_dypo.refit.transports.links import LinkError, Sender, ServerLinks
from megatron_dypo.refit.transports.lost_peers import LostServers
from megatron_dypo.refit.transports.messages import Message, cut
from megatron_dypo.refit.transports.threads import run_concurrently, run_unless_lost

_FLOATS = (torch.bfloat16, torch.float32, torch.float16)

Link = tuple[int, int]
"""Server, server rank."""


class TrainerRank:
    """The transfers and links of one trainer rank."""

    def __init__(
        self,
        message: ControlMessage,
        rank: int,
        store: dist.Store,
        urls: Sequence[str],
        *,
        lost_servers: LostServers,
        make_slices: Callable[[], SliceSource],
    ) -> None:
        """Read the parameters of the server ranks from the store.

        ``message`` is any of this connection. ``make_slices`` returns this rank's current slices at the time of a
        refit.

        Raises:
            ServerError: a server runs on another kind of device, or its parameters have other types than the plan's.
        """
        self._message = message
        self._plan = message.plan.make_plan()
        self._rank = rank
        self._store = store
        self._urls = urls
        self._lost_servers = lost_servers
        self._make_slices = make_slices
        self._dtypes: dict[Link, Mapping[str, torch.dtype]] = {}
        self._messages: dict[Link, list[Message]] = {}
        self._senders: dict[int, Sender] = {}
        transfers: dict[Link, list[Transfer]] = {}
        for transfer in self._plan.sends(rank):
            transfers.setdefault((transfer.server, transfer.server_rank), []).append(transfer)
        for link, of_link in transfers.items():
            dtypes = self._dtypes[link] = self._read_dtypes(link)
            for transfer in of_link:
                self._require_dtype(transfer, dtypes[transfer.served_name])
            self._messages[link] = list(cut(of_link, dtypes, message.slot_bytes))

    def connect(self, deadline: Deadline) -> None:
        """Connect with the ranks of all servers that this rank sends to.

        Raises:
            ServerError: a server did not connect.
        """
        for server in sorted({server for server, _ in self._messages}):
            try:
                self._senders[server] = self._connect(server, deadline)
            except LinkError as error:
                raise ServerError(f"{self._urls[server]}: no connection: {error}", self._urls[server]) from error

    def send(self, refit: int, version: int, deadline: Deadline) -> int:
        """Send everything over all links at once; return the bytes sent.

        ``refit`` is the number of the refit on this connection.

        Collective over the tensor-parallel groups if weights are quantised.

        Raises:
            ServerError: servers were lost; the message names each.
        """
        slices = self._make_slices()
        senders = {
            (server, server_rank): LinkSender(
                slices,
                self._senders[server].outgoing(server_rank, deadline),
                messages,
                self._dtypes[server, server_rank],
                version=version,
                verify=self._message.verify,
                slot_bytes=self._message.slot_bytes,
            )
            for (server, server_rank), messages in self._messages.items()
        }
        servers = [server for server, _ in senders]
        errors = run_concurrently(
            [sender.send for sender in senders.values()],
            lambda index: self._lost_servers.error(refit, servers[index]),
        )
        device.synchronize()
        self._raise({link: error for link, error in zip(senders, errors, strict=True) if error is not None})
        return sum(sender.num_bytes for sender in senders.values())

    def close(self) -> None:
        """Close all links at once, and drop the store. No call may follow."""
        for sender in self._senders.values():
            sender.close()
        self._senders.clear()
        del self._store, self._lost_servers

    def _connect(self, server: int, deadline: Deadline) -> Sender:
        links = ServerLinks(
            store=self._store,
            store_host=self._message.store_host,
            server=server,
            sources=self._plan.sources_of(server),
            num_server_ranks=self._plan.servers[server].tensor,
            peers=tuple(sorted(rank for of, rank in self._messages if of == server)),
            most_of_a_rank=self._message.most_links,
            slot_bytes=self._message.slot_bytes,
        )
        return run_unless_lost(
            functools.partial(sender_of(self._message.transport).connect, links, self._rank, deadline),
            functools.partial(self._lost_servers.error, 0, server),
        )

    def _raise(self, errors: Mapping[Link, BaseException]) -> None:
        ours = [error for error in errors.values() if not isinstance(error, LinkError)]
        if ours:
            raise ours[0]
        if errors:
            lost = {f"{self._urls[server]}: server rank {rank}: {error}" for (server, rank), error in errors.items()}
            raise ServerError("; ".join(sorted(lost)), *{self._urls[server] for server, _ in errors})

    def _require_dtype(self, transfer: Transfer, dtype: torch.dtype) -> None:
        """Raise ServerError if quantised weights or their scales would change their type; others may be rounded."""
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
        if problem := refusal(self._plan.encoding.quantization, kind, inventory["capability"]):
            raise ServerError(f"{url}: refit.quantize={self._plan.encoding.quantization}: {problem}", url)
        return {name: getattr(torch, dtype) for name, (_, dtype) in inventory["parameters"].items()}
