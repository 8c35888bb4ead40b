"""Who is lost, by a real store."""

from __future__ import annotations

import datetime

import pytest
import torch.distributed as dist

from megatron_dypo.parallel.stores import ServedStore, reach_store
from megatron_dypo.refit.control_message import ended_key
from megatron_dypo.refit.transports import lost_peers
from megatron_dypo.refit.transports.links import LinkError
from megatron_dypo.refit.transports.lost_peers import LostServers, trainer_error

TIMEOUT = datetime.timedelta(seconds=20)


def served() -> tuple[ServedStore, dist.Store]:
    store = ServedStore("127.0.0.1", TIMEOUT)
    return store, reach_store(store.address, TIMEOUT)


def test_links_to_a_server_wait_until_some_seconds_after_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    store, client = served()
    lost = LostServers(client)
    assert lost.error(3, 0) is None
    store.store.set(ended_key(0), "2")  # the call of the refit before
    monkeypatch.setattr(lost_peers, "GRACE_S", 0.0)
    assert lost.error(3, 0) is None
    store.store.set(ended_key(0), "3")
    monkeypatch.setattr(lost_peers, "GRACE_S", 60.0)
    assert lost.error(3, 0) is None
    monkeypatch.setattr(lost_peers, "GRACE_S", 0.0)
    assert isinstance(lost.error(3, 0), LinkError)
    assert lost.error(3, 1) is None


def test_a_store_that_is_gone_took_the_trainer_with_it() -> None:
    store, client = served()
    assert trainer_error(client) is None
    del store
    assert isinstance(trainer_error(client), LinkError)
    error = LostServers(client).error(1, 0)
    assert error is not None
    assert not isinstance(error, LinkError)  # no server is at fault
