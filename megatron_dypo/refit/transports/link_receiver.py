"""The server rank's end of one link during one refit: it writes messages into parameters, then compares checksums."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from megatron_dypo.refit.checksums import checksum, should_verify
from megatron_dypo.refit.control_message import ControlMessage
from megatron_dypo.refit.slices import rectangle
from megatron_dypo.refit.transports.links import DEPTH, Incoming
from megatron_dypo.refit.transports.messages import Message, Part, as_bytes, part_of


class LinkReceiver:
    """Receives the messages of one link, in order."""

    def __init__(
        self,
        params: Mapping[str, Tensor],
        source: int,
        link: Incoming,
        messages: Sequence[Message],
        refit: ControlMessage,
    ) -> None:
        """``source`` is the trainer rank at the other end."""
        self.source = source
        self.num_bytes = 0
        self._params = params
        self._link = link
        self._messages = messages
        self._refit = refit

    def receive(self) -> None:
        """Receive all messages, write their parts into the parameters, and compare the checksums of verified parts.

        Raises:
            LinkError: the trainer rank was lost.
            RuntimeError: checksums differ; the message names the parameters.
        """
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
        """Announce a message; return it, and the place into which it is received directly, if any."""
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
        """Return the [rows, cols] view into the parameter for a part."""
        to = part.transfer
        param = self._params[to.served_name]
        return rectangle(param, to.served_row + part.first_row, to.served_col, part.rows, to.cols)

    def _verified(self, message: Message) -> Iterator[Part]:
        return (p for p in message.parts if should_verify(p.index, self._refit.version, self._refit.verify))

    def _compare(self, ours: Tensor) -> None:
        """Receive the trainer rank's checksums and compare them with ``ours``."""
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
