"""Links between CPUs: what arrives, who may connect, and how a lost end is noticed."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from megatron_dypo.refit.deadline import Deadline
from megatron_dypo.refit.transports import tcp
from megatron_dypo.refit.transports.links import LinkError, Outgoing
from megatron_dypo.refit.transports.tcp import TcpReceiver, TcpSender
from tests.support.refit_links import SERVER_RANK, SOURCE, links_of

LIMIT_S = 20.0
PLACE = f"tcp/0/{SERVER_RANK}"


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


def receiver_comes(pool: ThreadPoolExecutor, store: dist.Store, limit_s: float = LIMIT_S) -> Future[TcpReceiver]:
    return pool.submit(TcpReceiver.connect, links_of(store, peers=(SOURCE,)), SERVER_RANK, Deadline(limit_s))


def sender_comes(store: dist.Store, rank: int = SOURCE, limit_s: float = LIMIT_S) -> TcpSender:
    return TcpSender.connect(links_of(store, peers=(SERVER_RANK,)), rank, Deadline(limit_s))


def connected(pool: ThreadPoolExecutor) -> tuple[TcpSender, TcpReceiver]:
    store = dist.HashStore()
    coming = receiver_comes(pool, store)
    return sender_comes(store), coming.result(LIMIT_S)


def place_in(store: dist.Store) -> dict[str, object]:
    store.wait([PLACE])
    place: dict[str, object] = json.loads(store.get(PLACE))
    return place


def stranger(store: dist.Store, says: bytes) -> socket.socket:
    place = place_in(store)
    connection = socket.create_connection((place["host"], place["port"]), LIMIT_S)  # type: ignore[arg-type]
    connection.sendall(says)
    return connection


def post_more_than_buffers_hold(outgoing: Outgoing) -> None:
    for _ in range(25):
        outgoing.post(torch.zeros(2**22, dtype=torch.uint8))


def test_messages_arrive_in_order_in_their_places_and_in_the_buffer(pool):
    sender, receiver = connected(pool)
    outgoing, incoming = sender.outgoing(SERVER_RANK, Deadline(LIMIT_S)), receiver.incoming(SOURCE, Deadline(LIMIT_S))
    large = torch.randint(256, (3 * 2**20 + 1,), dtype=torch.uint8)  # more than the kernel's buffers hold
    staged = outgoing.stage(16).copy_(torch.arange(16))
    sent = pool.submit(lambda: [outgoing.post(staged), outgoing.post(large), outgoing.drain()])
    place = torch.zeros(2 * large.numel(), dtype=torch.uint8)
    incoming.expect(16, None)
    incoming.expect(large.numel(), place[5 : 5 + large.numel()])
    assert incoming.take().tolist() == list(range(16))
    incoming.release()
    incoming.take()
    incoming.release()
    sent.result(LIMIT_S)
    assert torch.equal(place[5 : 5 + large.numel()], large)
    assert place[:5].sum() + place[5 + large.numel() :].sum() == 0
    sender.close()
    receiver.close()


def test_a_server_rank_listens_at_its_address_towards_the_store_and_only_until_all_have_come(pool):
    store = dist.HashStore()
    coming = receiver_comes(pool, store)
    place = place_in(store)
    assert place["host"] == "127.0.0.1"
    sender, receiver = sender_comes(store), coming.result(LIMIT_S)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((place["host"], place["port"]), LIMIT_S)  # type: ignore[arg-type]
    sender.close()
    receiver.close()


NO_PROOF = bytes(tcp._PROOF_BYTES)


@pytest.mark.parametrize(
    "says",
    [SOURCE.to_bytes(4, "big") + NO_PROOF, b"GET / HTTP/1.1\r\nHost: servers of weights\r\n\r\n", b""],
    ids=["no proof", "another protocol", "nothing"],
)
def test_whoever_has_no_key_gets_no_byte_and_takes_nobodys_place(pool, monkeypatch, caplog, says):
    monkeypatch.setattr(tcp, "_PROOF_WAIT_S", 0.5)
    store = dist.HashStore()
    coming = receiver_comes(pool, store)
    # A reset closes a connection whose bytes were not read.
    with stranger(store, says) as connection, contextlib.suppress(ConnectionResetError):
        assert connection.recv(1) == b""
    sender = sender_comes(store)
    coming.result(LIMIT_S).close()
    sender.close()
    assert "had no key" in caplog.text


def test_the_proof_of_one_rank_is_none_for_another(pool, monkeypatch):
    """Rank 4 has no link here: its place does not exist, though it knows the key."""
    monkeypatch.setattr(tcp, "_PROOF_WAIT_S", 0.5)
    store = dist.HashStore()
    coming = receiver_comes(pool, store, limit_s=2.0)
    with pytest.raises(LinkError, match="rank 0: "):
        sender_comes(store, rank=4, limit_s=5.0)
    with pytest.raises(LinkError, match=r"trainer ranks \[3\] did not come"):
        coming.result(LIMIT_S)


def test_a_trainer_rank_sends_nothing_to_a_listener_without_the_key(pool):
    store = dist.HashStore()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        place = {"host": "127.0.0.1", "port": listener.getsockname()[1], "key": "00" * 32}
        store.set(PLACE, json.dumps(place))

        def pretend() -> None:
            connection, _ = listener.accept()
            connection.recv(64)
            connection.sendall(NO_PROOF)

        pretended = pool.submit(pretend)
        with pytest.raises(LinkError, match="does not know the key"):
            sender_comes(store)
        pretended.result(LIMIT_S)


def test_a_server_rank_that_does_not_come_is_an_error_at_the_deadline():
    with pytest.raises(LinkError, match="rank 0: "):
        sender_comes(dist.HashStore(), limit_s=0.3)


def test_the_loss_of_the_other_end_is_an_error_at_once(pool):
    sender, receiver = connected(pool)
    incoming = receiver.incoming(SOURCE, Deadline(LIMIT_S))
    incoming.expect(8, None)
    taken = pool.submit(incoming.take)
    sender.close()
    with pytest.raises(LinkError, match="closed by peer"):
        taken.result(LIMIT_S / 2)
    receiver.close()


def test_posts_to_a_lost_server_rank_are_an_error(pool):
    sender, receiver = connected(pool)
    outgoing = sender.outgoing(SERVER_RANK, Deadline(LIMIT_S))
    receiver.close()
    with pytest.raises(LinkError, match="TCP: "):
        post_more_than_buffers_hold(outgoing)
    sender.close()


def test_close_frees_a_thread_that_waits_in_the_connection(pool):
    sender, receiver = connected(pool)
    incoming = receiver.incoming(SOURCE, Deadline(LIMIT_S))
    incoming.expect(8, None)
    waits = threading.Event()

    def take() -> None:
        waits.set()
        incoming.take()

    taken = pool.submit(take)
    waits.wait(LIMIT_S)
    receiver.close()
    with pytest.raises(LinkError):
        taken.result(LIMIT_S / 2)
    sender.close()


def test_both_ends_give_up_at_the_deadline(pool):
    sender, receiver = connected(pool)
    incoming = receiver.incoming(SOURCE, Deadline(0.3))
    incoming.expect(8, None)
    with pytest.raises(LinkError, match="time"):
        incoming.take()
    outgoing = sender.outgoing(SERVER_RANK, Deadline(0.3))
    with pytest.raises(LinkError, match="time"):
        post_more_than_buffers_hold(outgoing)  # nobody reads
    sender.close()
    receiver.close()
