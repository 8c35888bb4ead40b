"""A bucket reaches a server through a group of two processes, and a server that fails ends the wait at once."""

from __future__ import annotations

import datetime
import multiprocessing as mp
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_dypo.mcore.compat.groups import NEW_GROUP, WORLD
from megatron_dypo.refit.answers import ServerError
from megatron_dypo.refit.control import SGLangControl
from megatron_dypo.refit.deadline import Deadline
from megatron_dypo.refit.transports.buckets import Bucket, fill_buckets
from megatron_dypo.refit.transports.update_group import UpdateGroup
from tests.support.fake_control import KEY, FakeServer

DEADLINE_S = 3600.0
"""A deadline longer than any test may take: nobody can have waited for it."""
INIT, UPDATE = "/init_weights_update_group", "/update_weights_from_distributed"
TENSORS = [("a", torch.arange(6.0).view(2, 3)), ("b", torch.ones(5, dtype=torch.bfloat16))]


def take_part(pipe: Connection) -> None:
    """Join groups and receive buckets in the last one, in a process of its own, as SGLang's scheduler does."""
    pipe.send("ready")
    group: Any = None
    while True:
        try:
            asked = pipe.recv()
        except EOFError:
            return
        if isinstance(asked, dict):
            group = join(asked)
            pipe.send("joined")
        else:
            payload = torch.empty(asked, dtype=torch.uint8)
            dist.broadcast(payload, src=0, group=group)
            pipe.send(bytes(payload.numpy()))


def join(body: dict[str, Any]) -> Any:
    timeout = datetime.timedelta(seconds=DEADLINE_S)
    store = dist.TCPStore(body["master_address"], body["master_port"], is_master=False, timeout=timeout)
    name, size = body["group_name"], body["world_size"]
    options: dict[str, Any] = {"group_name": name, "backend_options": None, "timeout": timeout}
    prefixed = dist.PrefixStore(name, store)
    group, _ = NEW_GROUP.get()(size, body["rank_offset"], [], dist.Backend(body["backend"]), prefixed, **options)
    WORLD.get().pg_group_ranks[group] = {rank: rank for rank in range(size)}
    return group


@dataclass
class JoiningServer(FakeServer):
    """A server that joins the group, and records what it receives."""

    received: list[bytes] = field(default_factory=list)
    pipe: Any = None

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path in self.answers:
            return super().answer(path, body)
        if path == INIT:
            self.pipe.send(body)
            assert self.pipe.recv() == "joined"
        if path == UPDATE:
            tensors = zip(body["shapes"], body["dtypes"], strict=True)
            self.pipe.send(sum(torch.Size(shape).numel() * getattr(torch, dtype).itemsize for shape, dtype in tensors))
            self.received.append(self.pipe.recv())
        return super().answer(path, body)


@pytest.fixture(scope="module")
def scheduler() -> Iterator[Connection]:
    """Give the connection to the process that takes part, once it has imported everything."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=take_part, args=(theirs,), daemon=True)
    process.start()
    assert ours.recv() == "ready"
    yield ours
    process.kill()
    process.join()


@pytest.fixture
def server(scheduler: Connection) -> Iterator[JoiningServer]:
    server = JoiningServer(pipe=scheduler)
    server.start()
    yield server
    server.die()


@pytest.fixture
def control(server: JoiningServer) -> Iterator[SGLangControl]:
    control = SGLangControl([server.url], KEY)
    yield control
    control.close()


def bucket() -> Bucket:
    (made,) = fill_buckets(TENSORS, 1 << 10)
    return made


def test_a_bucket_arrives_byte_for_byte_and_the_group_is_left_in_order(server, control):
    group = UpdateGroup.form(control, "gloo", Deadline(DEADLINE_S))
    for _ in range(2):
        group.send(bucket(), Deadline(DEADLINE_S))
    assert server.received == [bytes(bucket().payload.numpy())] * 2
    group.leave()
    assert server.posts[-1] == "/destroy_weights_update_group"


def test_a_server_that_refuses_to_join_is_named_at_once(server, control):
    server.answers[INIT] = (400, {"success": False, "message": "no such backend"})
    with pytest.raises(ServerError, match=f"{server.url}{INIT}: status 400: no such backend"):
        UpdateGroup.form(control, "gloo", Deadline(DEADLINE_S))


def test_a_server_that_refuses_a_bucket_is_named_at_once(server, control):
    group = UpdateGroup.form(control, "gloo", Deadline(DEADLINE_S))
    server.answers[UPDATE] = (400, {"success": False, "message": "no session is open"})
    with pytest.raises(ServerError, match=f"{server.url}{UPDATE}: status 400: no session is open"):
        group.send(bucket(), Deadline(DEADLINE_S))
    group.abandon()


def test_a_server_whose_torch_may_have_another_backend_of_that_name_is_refused_before_a_group_is_made() -> None:
    server = FakeServer(sglang="0.5.24")
    server.start()
    control = SGLangControl([server.url], KEY)
    try:
        with pytest.raises(ServerError, match=rf"^{server.url}: SGLang 0\.5\.24: its torch may name another backend"):
            UpdateGroup.form(control, "nccl", Deadline(20.0))
        assert server.posts == []
    finally:
        control.close()
        server.die()
