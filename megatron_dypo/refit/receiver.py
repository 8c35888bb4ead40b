"""The receiving end of a refit, inside SGLang: ``--custom-weight-loader megatron_dypo.refit.receiver.load``.

SGLang calls :func:`load` in the scheduler process of each tensor-parallel rank. It needs torch and the standard library.

On the store of a connection, under keys of this rank:
    inventory  written once, before anything is sent: the parameters that the model has
    go         written by the trainer once it has compared all inventories with the plan
    report     written after each refit: bytes received, or what went wrong
"""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dypo.parallel import device
from megatron_dypo.refit.checksums import checksum, is_verified
from megatron_dypo.refit.control_message import ControlMessage, from_named_tensors
from megatron_dypo.refit.deadline import Deadline
from megatron_dypo.refit.plan.plan import Transfer
from megatron_dypo.refit.slices import rectangle
from megatron_dypo.refit.transports.in_threads import run_all
from megatron_dypo.refit.transports.links import DEPTH, Incoming, Receiver, ServerLinks
from megatron_dypo.refit.transports.local import LocalReceiver
from megatron_dypo.refit.transports.messages import Message, Part, as_bytes, cut, part_of
from megatron_dypo.refit.transports.p2p import GroupReceiver

GO = "go"
CONNECTORS: dict[str, type[Receiver]] = {"p2p": GroupReceiver, "local": LocalReceiver}

logger = logging.getLogger(__name__)


def load(model: torch.nn.Module, named_tensors: list[tuple[str, Tensor]]) -> None:
    """Receive one refit into the parameters of ``model``. Raises nothing: that would end the server.

    What goes wrong is reported to the trainer, which then fails the refit.
    """
    try:
        message = from_named_tensors(named_tensors)
        store = _open_store(message)
        try:
            report: dict[str, object] = {"bytes": _session(model, message, store).receive(message)}
        except Exception as error:
            logger.exception("refit of version %d", message.version)
            report = {"error": str(error) or type(error).__name__}
            _forget()
        store.set(report_key(message.refit, message.server, message.server_rank), json.dumps(report))
    except Exception:
        logger.exception("refit without a report")
        _forget()


def inventory_key(server: int, server_rank: int) -> str:
    return f"inventory/{server}/{server_rank}"


def report_key(refit: int, server: int, server_rank: int) -> str:
    return f"report/{refit}/{server}/{server_rank}"


class Session:
    """One connection to the trainer, and this rank's part of the plan."""

    def __init__(self, model: torch.nn.Module, message: ControlMessage, store: dist.Store) -> None:
        """Meets all sources that send to this server.

        Raises:
            ValueError: a plan that is not possible.
            RuntimeError: somebody did not come, or the trainer refused the inventory.
        """
        deadline = Deadline(message.timeout_s)
        self.connection = message.connection
        self._params = {name: param.detach() for name, param in model.named_parameters()}
        store.set(inventory_key(message.server, message.server_rank), json.dumps(inventory(self._params)))
        plan = message.plan.make_plan()
        transfers = plan.receives(message.server, message.server_rank)
        links: dict[int, list[Transfer]] = {}
        for transfer in transfers:
            links.setdefault(transfer.source, []).append(transfer)
        # The trainer says go once it has found every server rank of the plan in the inventory.
        store.wait([GO], datetime.timedelta(seconds=deadline.remaining()))
        self._padded = self._padded_params(transfers)
        dtypes = {name: param.dtype for name, param in self._params.items()}
        self._messages = {source: list(cut(of_link, dtypes, message.slot_bytes)) for source, of_link in links.items()}
        links_here = ServerLinks(
            store=store,
            server=message.server,
            sources=plan.sources_of(message.server),
            num_server_ranks=message.plan.servers[message.server].tensor,
            slot_bytes=message.slot_bytes,
        )
        self._links = CONNECTORS[message.transport].connect(links_here, message.server_rank, deadline)

    def receive(self, message: ControlMessage) -> int:
        """Bring all parameters to the refit's version; returns the bytes that came.

        Raises:
            RuntimeError: a source was lost, or what came is not what was sent: names the tensor.
        """
        deadline = Deadline(message.timeout_s)
        for name in self._padded:
            self._params[name].zero_()  # SGLang has zeros where the vocabulary is padded
        ends = [
            _LinkEnd(self._params, source, self._links.incoming(source, deadline), messages, message)
            for source, messages in self._messages.items()
        ]
        errors = run_all([end.receive for end in ends])
        device.synchronize()
        lost = [f"from trainer rank {end.source}: {why}" for end, why in zip(ends, errors, strict=True) if why]
        if lost:
            raise RuntimeError("; ".join(lost))
        return sum(end.num_bytes for end in ends)

    def close(self) -> None:
        self._links.close()

    def _padded_params(self, transfers: Sequence[Transfer]) -> list[str]:
        """The parameters of which the plan leaves elements out."""
        missing = {name: param.numel() for name, param in self._params.items()}
        for transfer in transfers:
            missing[transfer.served_name] -= transfer.rows * transfer.cols
        return [name for name, left in missing.items() if left]


class _LinkEnd:
    """This rank's end of one link, for one refit."""

    def __init__(
        self,
        params: Mapping[str, Tensor],
        source: int,
        link: Incoming,
        messages: Sequence[Message],
        refit: ControlMessage,
    ) -> None:
        self.source = source
        self.num_bytes = 0
        self._params = params
        self._link = link
        self._messages = messages
        self._refit = refit

    def receive(self) -> None:
        """Take all messages, into their places, then the checksums of those that are verified."""
        waiting: deque[tuple[Message, Tensor | None]] = deque()
        upcoming = iter(self._messages)
        for message in itertools.islice(upcoming, DEPTH):
            waiting.append(self._expect(message))
        sums = []
        while waiting:
            message, into = waiting.popleft()
            payload = self._link.take()
            if into is None:
                self._unpack(message, payload)
            self._link.release()
            for following in itertools.islice(upcoming, 1):
                waiting.append(self._expect(following))
            self.num_bytes += message.num_bytes
            sums += [checksum(self._place(part).contiguous()) for part in self._verified(message)]
        if sums:
            self._compare(torch.stack(sums))

    def _expect(self, message: Message) -> tuple[Message, Tensor | None]:
        into = None
        if len(message.parts) == 1:
            place = self._place(message.parts[0])
            into = as_bytes(place) if place.is_contiguous() else None
        self._link.expect(message.num_bytes, into)
        return message, into

    def _unpack(self, message: Message, payload: Tensor) -> None:
        for part in message.parts:
            place = self._place(part)
            place.copy_(part_of(payload, part, place.dtype))

    def _place(self, part: Part) -> Tensor:
        """[rows, cols] view into the parameter."""
        to = part.transfer
        param = self._params[to.served_name]
        return rectangle(param, to.served_row + part.first_row, to.served_col, part.rows, to.cols)

    def _verified(self, message: Message) -> Iterator[Part]:
        return (p for p in message.parts if is_verified(p.index, self._refit.version, self._refit.verify))

    def _compare(self, ours: Tensor) -> None:
        theirs = torch.empty_like(ours)
        for piece in as_bytes(theirs).split(self._refit.slot_bytes):
            self._link.expect(piece.numel(), piece)
            self._link.take()
            self._link.release()
            self.num_bytes += piece.numel()
        parts = (part for message in self._messages for part in self._verified(message))
        wrong = [p.transfer.served_name for p, o, t in zip(parts, ours, theirs, strict=True) if not torch.equal(o, t)]
        if wrong:
            names = ", ".join(dict.fromkeys(wrong))
            raise RuntimeError(f"checksums differ: {names}")


def inventory(params: Mapping[str, Tensor]) -> dict[str, object]:
    """What this rank has: name → shape and dtype, and the device."""
    return {
        "device": device.device_kind(),
        "parameters": {n: [list(p.shape), str(p.dtype).removeprefix("torch.")] for n, p in params.items()},
    }


_held: list[Session] = []


def _session(model: torch.nn.Module, message: ControlMessage, store: dist.Store) -> Session:
    """The session of the message's connection; a new connection ends the one before."""
    if _held and _held[0].connection == message.connection:
        return _held[0]
    if not message.is_new:
        raise RuntimeError(f"connection {message.connection} is not held here (any more)")
    _forget()
    _held.append(Session(model, message, store))
    return _held[0]


def _forget() -> None:
    while _held:
        _held.pop().close()


@functools.lru_cache(maxsize=1)
def _store_at(host: str, port: int, connection: str, timeout_s: float) -> dist.Store:
    return dist.TCPStore(host, port, None, False, timeout=datetime.timedelta(seconds=timeout_s))


def _open_store(message: ControlMessage) -> dist.Store:
    """The trainer's store; kept between the refits of a connection."""
    return _store_at(message.store_host, message.store_port, message.connection, message.timeout_s)
