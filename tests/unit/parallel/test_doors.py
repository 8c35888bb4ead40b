"""A store behind a door: whoever has the key uses it from another address, and nobody else gets a byte."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Thread

import pytest
import torch.distributed as dist

from megatron_dypo.parallel.doors import Door, KeyRefusedError, Tunnel
from megatron_dypo.parallel.stores import OpenStore, ServedStore, StoreAddress, reach_store
from tests.support.strangers import answer_of, listening

KEY = "a key of sixteen"
TIMEOUT = datetime.timedelta(seconds=20)
ELSEWHERE = "127.0.0.2"
"""An address of this host at which nothing listens that listens on 127.0.0.1."""


@contextlib.contextmanager
def echo() -> Iterator[int]:
    """Give the port of a server that returns the first 4 bytes of each connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(4))
        writer.close()

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0))
    thread = Thread(target=loop.run_forever)
    thread.start()
    yield server.sockets[0].getsockname()[1]
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def test_bytes_pass_both_ways_with_the_key():
    with echo() as port:
        door = Door(ELSEWHERE, 0, KEY, port)
        tunnel = Tunnel(ELSEWHERE, door.port, KEY, patience_s=20)
        for text in (b"1234", b"abcd"):
            with socket.create_connection(("127.0.0.1", tunnel.port), timeout=20) as connection:
                connection.sendall(text)
                assert connection.recv(8) == text
                assert connection.recv(8) == b""
        tunnel.close()
        door.close()


def test_the_wrong_key_opens_nothing():
    with echo() as port:
        door = Door(ELSEWHERE, 0, KEY, port)
        with pytest.raises(KeyRefusedError, match=f"{ELSEWHERE}:{door.port} does not accept the key"):
            Tunnel(ELSEWHERE, door.port, KEY + "!", patience_s=20)
        door.close()


def test_a_recorded_entry_opens_no_second_one():
    """The bytes of one who knew the key end with the door's challenge, since that is a new one."""
    with echo() as port:
        door = Door(ELSEWHERE, 0, KEY, port)
        recorded = record_entry(door.port)
        with socket.create_connection((ELSEWHERE, door.port), timeout=20) as connection:
            connection.sendall(recorded + b"1234")
            assert len(connection.recv(64, socket.MSG_WAITALL)) == 64, "the door's challenge and proof"
            assert connection.recv(8) == b""
        door.close()


def record_entry(port: int) -> bytes:
    """Return the bytes that a tunnel sends to a door at ``port``, as somebody between them reads them."""
    recorded = b""
    with socket.create_server(("127.0.0.3", 0)) as between:
        between.settimeout(20)

        def pass_on() -> None:
            nonlocal recorded
            theirs, _ = between.accept()
            with theirs, socket.create_connection((ELSEWHERE, port)) as far:
                recorded += theirs.recv(64, socket.MSG_WAITALL)
                far.sendall(recorded)
                theirs.sendall(far.recv(64, socket.MSG_WAITALL))
                recorded += theirs.recv(32, socket.MSG_WAITALL)

        with ThreadPoolExecutor(1) as pool:
            passed = pool.submit(pass_on)
            Tunnel("127.0.0.3", between.getsockname()[1], KEY, patience_s=20).close()
            passed.result()
    assert len(recorded) == 96
    return recorded


def test_a_door_that_does_not_open_is_named():
    with socket.create_server((ELSEWHERE, 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(TimeoutError, match=f"nothing answers at {ELSEWHERE}:{port} after 0 s"):
        Tunnel(ELSEWHERE, port, KEY, patience_s=0)


def test_a_store_of_one_host_listens_on_a_loopback_address_alone():
    before = listening()
    served = ServedStore("127.0.0.1", TIMEOUT)
    assert listening() - before == {("127.0.0.1", served.address.port)}
    reach_store(served.address, TIMEOUT).set("a", "1")
    assert served.store.get("a") == b"1"
    port = served.address.port
    del served
    assert ("127.0.0.1", port) not in listening()


def test_a_store_for_other_hosts_is_reached_with_the_key_and_answers_nobody_else():
    before = listening()
    served = ServedStore(ELSEWHERE, TIMEOUT, key=KEY)
    assert listening() - before == {("127.0.0.1", served.store.port), (ELSEWHERE, served.address.port)}
    assert answer_of(ELSEWHERE, served.address.port) is None
    client = reach_store(served.address, TIMEOUT)
    client.set("a", "1")
    assert served.store.get("a") == b"1"
    assert dist.PrefixStore("p", client).add("n", 2) == 2
    with pytest.raises(KeyRefusedError):
        reach_store(StoreAddress(host=ELSEWHERE, port=served.address.port, key="another"), TIMEOUT)


def test_one_who_waits_is_told_when_the_store_is_gone():
    served = ServedStore(ELSEWHERE, TIMEOUT, key=KEY)
    client = reach_store(served.address, TIMEOUT)
    client.set("a", "1")
    del served
    with pytest.raises(RuntimeError):
        client.get("never written")


def test_the_key_of_a_store_is_not_shown():
    assert KEY not in repr(ServedStore(ELSEWHERE, TIMEOUT, key=KEY).address)


def test_a_locked_store_keeps_its_clients_and_answers_nobody_else():
    opened = OpenStore(ELSEWHERE, 2, TIMEOUT)
    client = dist.TCPStore(ELSEWHERE, opened.store.port, None, False, TIMEOUT)
    assert answer_of(ELSEWHERE, opened.store.port) is not None
    opened.lock()
    assert answer_of(ELSEWHERE, opened.store.port) is None
    client.set("a", "1")
    assert opened.store.get("a") == b"1"


def test_torchs_own_store_answers_strangers():
    """The witness of the tests above: a stranger would get an answer of a store without a door."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, TIMEOUT, wait_for_workers=False)
    assert answer_of(ELSEWHERE, store.port) is not None
