"""The process group in which SGLang receives weights: rank 0 is a rank of the trainer, the others are the servers'."""

from __future__ import annotations

import datetime
import functools
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch.distributed as dist

from megatron_dypo.mcore.compat.groups import abort, join_as_rank_0
from megatron_dypo.parallel import streams
from megatron_dypo.parallel.interfaces import address_towards
from megatron_dypo.parallel.stores import OpenStore
from megatron_dypo.refit.answers import ServerError, ServerInfo
from megatron_dypo.refit.control import SGLangControl
from megatron_dypo.refit.deadline import Deadline
from megatron_dypo.refit.transports.buckets import Bucket
from megatron_dypo.supported import RANGES

T = TypeVar("T")
_SERVERS = RANGES["sglang"]


class UpdateGroup:
    """A process group of one trainer rank (rank 0) and every rank of every server."""

    def __init__(self, control: SGLangControl, name: str, store: Any, group: dist.ProcessGroup) -> None:
        self._control = control
        self._name = name
        self._store = store  # the servers use it as long as the group exists
        self._group = group

    @classmethod
    def form(cls, control: SGLangControl, backend: str, deadline: Deadline) -> UpdateGroup:
        """Form a new group with a unique name.

        Raises:
            ServerError: a server did not join.
        """
        infos = control.describe(deadline)
        for info in infos:
            _require_plain(info, backend)
        name = f"dypo-{uuid.uuid4().hex}"
        host, world_size = address_towards_all(control.urls), 1 + sum(info.tensor_parallel for info in infos)
        timeout = datetime.timedelta(seconds=deadline.seconds)
        opened = OpenStore(host, world_size, timeout)  # SGLang's end of it has no key
        common = {"master_address": host, "master_port": opened.store.port, "world_size": world_size}
        bodies, offset = [], 1
        for info in infos:
            bodies.append({**common, "rank_offset": offset, "group_name": name, "backend": backend})
            offset += info.tensor_parallel
        joined = control.start_init_group(bodies, deadline)
        join = functools.partial(join_as_rank_0, opened.store, world_size, name, backend, timeout)
        group = _await(_in_daemon_thread(join), joined, deadline)
        joined.result()
        opened.lock()
        return cls(control, name, opened.store, group)

    def send(self, bucket: Bucket, deadline: Deadline) -> None:
        """Broadcast one bucket; return when every server has loaded it.

        Raises:
            ServerError: a server refused, died, or took too long.
        """
        body = {
            "names": bucket.names,
            "dtypes": bucket.dtypes,
            "shapes": bucket.shapes,
            "group_name": self._name,
            "load_format": "flattened_bucket",
            # /flush_cache would also collect the server's garbage, which takes longer than a refit.
            "flush_cache": True,
        }
        loaded = self._control.start_update(body, deadline)
        try:
            work = dist.broadcast(bucket.payload, src=0, group=self._group, async_op=True)
            _await(_in_daemon_thread(functools.partial(streams.finish, work, deadline.remaining())), loaded, deadline)
        except (RuntimeError, TimeoutError) as error:
            if isinstance(error, ServerError):
                raise
            # The connection broke. The HTTP call tells which server is at fault.
            loaded.result()
            raise
        loaded.result()

    def abandon(self) -> None:
        """Close the group at once. This frees servers that wait for a broadcast.

        A running broadcast delays the closing until it times out, so a thread does it.
        """
        _in_daemon_thread(self._end)

    def leave(self) -> None:
        """Tell the servers, then close the group."""
        self._control.attempt([("/destroy_weights_update_group", {"group_name": self._name})], timeout_s=10.0)
        dist.destroy_process_group(self._group)

    def _end(self) -> None:
        abort(self._group)
        dist.destroy_process_group(self._group)


def address_towards_all(urls: Sequence[str]) -> str:
    """Return the address of this host as the servers reach it: a loopback address only if all servers are local."""
    address = "127.0.0.1"
    for url in urls:
        address = address_towards(urlsplit(url).hostname or url)
        if not address.startswith("127.") and address != "::1":
            break
    return address


def _require_plain(info: ServerInfo, backend: str) -> None:
    if backend != "gloo" and info.sglang and _SERVERS.ends_before(info.sglang):
        raise ServerError(
            f"{info.url}: SGLang {info.sglang}: its torch may name another backend {backend!r} than the trainer's, "
            f"and a broadcast between the two hangs; use SGLang {_SERVERS}, or refit.transport=disk",
            info.url,
        )
    for name in ("pipeline_parallel", "data_parallel"):
        size = getattr(info, name)
        if size != 1:
            raise ServerError(f"{info.url}: {name}={size}: SGLang's distributed update needs 1; use transport=disk")


def _in_daemon_thread(action: Callable[[], T]) -> Future[T]:
    """Run a call that cannot be interrupted in a daemon thread, so that neither the caller nor the end of the process
    must wait for it."""
    future: Future[T] = Future()
    here = streams.on_this_gpu(action)

    def run() -> None:
        try:
            future.set_result(here())
        except BaseException as error:  # noqa: BLE001, raised by whoever waits for the result
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _await(made: Future[T], answers: Future[Any], deadline: Deadline) -> T:
    """Wait for ``made`` and return its result, as long as no answer is an error.

    Raises:
        ServerError: an answer is an error. While answers are missing, only the deadline of their call counts, since its
            error names the server.
        TimeoutError: all servers have answered, and the deadline has passed.
    """
    wait([made, answers], return_when=FIRST_COMPLETED)
    if not made.done():
        answers.result()
    while not made.done():
        wait([made], timeout=deadline.remaining())
    return made.result()
