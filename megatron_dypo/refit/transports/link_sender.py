"""The trainer rank's end of one link during one refit: it sends slices as messages, then checksums of some parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_dypo.refit.checksums import Verify, checksum, should_verify
from megatron_dypo.refit.plan.refit_plan import Transfer
from megatron_dypo.refit.slices import SliceSource
from megatron_dypo.refit.transports.links import Outgoing
from megatron_dypo.refit.transports.messages import Message, Part, as_bytes, part_of


class LinkSender:
    """Sends the messages of one link, in order."""

    def __init__(
        self,
        slices: SliceSource,
        link: Outgoing,
        messages: Sequence[Message],
        dtypes: Mapping[str, torch.dtype],
        *,
        version: int,
        verify: Verify,
        slot_bytes: int,
    ) -> None:
        """``dtypes`` are the types of the server rank's parameters; slices are converted to them."""
        self.num_bytes = 0
        self._slices = slices
        self._link = link
        self._messages = messages
        self._dtypes = dtypes
        self._version = version
        self._verify = verify
        self._slot_bytes = slot_bytes
        self._held: tuple[Transfer, Tensor] | None = None

    def send(self) -> None:
        """Send everything; return when all bytes have left.

        Raises:
            LinkError: the server rank was lost.
        """
        sums = []
        for message in self._messages:
            payload = self._payload(message)
            self._link.post(payload)
            self.num_bytes += message.num_bytes
            verified = (part for part in message.parts if should_verify(part.index, self._version, self._verify))
            sums += [checksum(part_of(payload, part, torch.uint8)) for part in verified]
        for piece in as_bytes(torch.stack(sums)).split(self._slot_bytes) if sums else ():
            self._link.post(piece)
            self.num_bytes += piece.numel()
        self._link.drain()

    def _payload(self, message: Message) -> Tensor:
        """Return the bytes of a message: those of the parameter if they are contiguous, else a copy."""
        if len(message.parts) == 1:
            rows = self._rows(message.parts[0])
            if rows.is_contiguous() and rows.dtype == self._dtypes[message.parts[0].transfer.served_name]:
                return as_bytes(rows)
        buffer = self._link.stage(message.num_bytes)
        for part in message.parts:
            part_of(buffer, part, self._dtypes[part.transfer.served_name]).copy_(self._rows(part))
        return buffer

    def _rows(self, part: Part) -> Tensor:
        """Return one part as [rows, cols]. The slice of its transfer is requested only once."""
        if self._held is None or self._held[0] is not part.transfer:
            self._held = (part.transfer, self._slices.slice(part.transfer))
        return self._held[1][part.first_row : part.first_row + part.rows]
