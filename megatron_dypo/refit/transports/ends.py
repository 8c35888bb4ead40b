"""The kinds of links, by transport and by device."""

from __future__ import annotations

from megatron_dypo.parallel import device
from megatron_dypo.refit.transports.links import Receiver, Sender
from megatron_dypo.refit.transports.local import LocalReceiver, LocalSender
from megatron_dypo.refit.transports.p2p import GroupReceiver, GroupSender
from megatron_dypo.refit.transports.tcp import TcpReceiver, TcpSender


def sender_of(transport: str) -> type[Sender]:
    """Return what a trainer rank sends with. Between CPUs, ``p2p`` is TCP; between GPUs, groups of NCCL."""
    if transport == "local":
        return LocalSender
    return GroupSender if device.on_gpu() else TcpSender


def receiver_of(transport: str) -> type[Receiver]:
    """Return what a server rank receives with: the other end of :func:`sender_of`."""
    if transport == "local":
        return LocalReceiver
    return GroupReceiver if device.on_gpu() else TcpReceiver
