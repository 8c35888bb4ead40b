"""A stand-in for an SGLang server that joins update groups over gloo and keeps what is broadcast to it."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dypo.mcore.compat.groups import NEW_GROUP
from tests.support.fake_control import FakeServer

_TIMEOUT = datetime.timedelta(seconds=60)


@dataclass
class BroadcastServer(FakeServer):
    """One server of one rank. A process can have one such server in a group, whose name torch registers."""

    loaded: dict[str, Tensor] = field(default_factory=dict)
    """Name → tensor, as it was received last."""
    received: list[str] = field(default_factory=list)
    """Names in the order in which they came."""
    groups: dict[str, Any] = field(default_factory=dict)

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/init_weights_update_group":
            self.groups[body["group_name"]] = _join(body)
        if path == "/update_weights_from_distributed":
            self._receive(body)
        return super().answer(path, body)

    def _receive(self, body: dict[str, Any]) -> None:
        dtypes = [getattr(torch, name) for name in body["dtypes"]]
        sizes = [
            dtype.itemsize * int(torch.Size(shape).numel()) for dtype, shape in zip(dtypes, body["shapes"], strict=True)
        ]
        payload = torch.empty(sum(sizes), dtype=torch.uint8)
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self.groups[body["group_name"]].broadcast([payload], options).wait()
        for name, dtype, shape, part in zip(body["names"], dtypes, body["shapes"], payload.split(sizes), strict=True):
            self.received.append(name)
            self.loaded[name] = part.clone().view(dtype).reshape(shape)


def _join(body: dict[str, Any]) -> Any:
    store = dist.TCPStore(body["master_address"], body["master_port"], body["world_size"], False, timeout=_TIMEOUT)
    group, _ = NEW_GROUP.get()(
        body["world_size"],
        body["rank_offset"],
        [],
        dist.Backend(body["backend"]),
        dist.PrefixStore(body["group_name"], store),
        group_name=body["group_name"],
        backend_options=None,
        timeout=_TIMEOUT,
    )
    return group
