"""The report of a server rank, on a network that is slow."""

from __future__ import annotations

import asyncio
import datetime
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_dypo.parallel import doors
from megatron_dypo.parallel.stores import ServedStore, reach_store
from megatron_dypo.refit import receiver
from megatron_dypo.refit.control_message import report_key

TIMEOUT = datetime.timedelta(seconds=60)


def test_a_report_has_arrived_when_the_server_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    served = ServedStore("127.0.0.1", TIMEOUT, key="k" * 16)  # a key: the store is behind a door

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            await asyncio.sleep(0.3)
            writer.write(data)

    class Held:
        def store(self, message: Any) -> dist.Store:
            return client

        def obey(self, *_: Any) -> int:
            return 8

    monkeypatch.setattr(doors, "_copy", slow)
    client = reach_store(served.address, TIMEOUT)
    message = SimpleNamespace(refit=3, version=7, server=1, server_rank=0)
    monkeypatch.setattr(receiver, "from_named_tensors", lambda _: message)
    monkeypatch.setattr(receiver, "_held", Held())
    receiver.load(torch.nn.Identity(), [])
    key = report_key(3, 1, 0)
    assert served.store.check([key])
    assert json.loads(served.store.get(key)) == {"bytes": 8}
