"""The leader's side of a planned connection: messages to the ranks of all servers, and their answers."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_dypo.parallel.doors import LOOPBACK
from megatron_dypo.parallel.stores import ServedStore
from megatron_dypo.refit.answers import ServerError
from megatron_dypo.refit.control import SGLangControl
from megatron_dypo.refit.control_message import (
    GO,
    ControlMessage,
    ended_key,
    inventory_key,
    report_key,
    to_payload,
)
from megatron_dypo.refit.deadline import Deadline
from megatron_dypo.refit.plan.refit_plan import RefitPlan
from megatron_dypo.rollout.server.command import WEIGHT_LOADER

_FUSION_HINT = (
    "; SGLang has fused the shared experts with the others: start it with --disable-shared-experts-fusion "
    "(rollout.servers.extra_args), or use refit.transport=broadcast or disk"
)
_TRANSPOSED_HINT = (
    "; SGLang's triton_kernels hold experts transposed: start it with --moe-runner-backend triton "
    "(rollout.servers.extra_args), or use refit.transport=broadcast or disk"
)
_NO_INVENTORY = "{}"
"""Value in the store in place of an inventory that will not come, because the server's call has ended."""


@dataclass(frozen=True, kw_only=True)
class Offer:
    """The facts about a new connection that every trainer rank needs."""

    urls: tuple[str, ...]
    message: ControlMessage
    """The message to the first rank of the first server. Other server ranks get the same with their own server and
    rank."""


class ServerRanks:
    """All ranks of the servers of one connection, and the store on which they meet the trainer's ranks."""

    def __init__(self, control: SGLangControl, served: ServedStore, plan: RefitPlan, message: ControlMessage) -> None:
        """``served`` is the master of the store. With its last reference, server ranks that still wait on it fail."""
        self._control = control
        self._served = served
        self._store = served.store
        self._plan = plan
        self.offer = Offer(urls=control.urls, message=message)
        # A second client, since a wait on the first one would block writes of the control's thread.
        timeout = datetime.timedelta(seconds=message.timeout_s)
        self._notes = dist.TCPStore(LOOPBACK, served.store.port, None, False, timeout=timeout)
        self._answers: list[Future[dict[str, Any]]] = []

    def ask_to_connect(self, deadline: Deadline) -> None:
        """Announce the connection to every server rank, and compare its inventory with the plan.

        Raises:
            ServerError: a rank failed, or its parameters differ from the plan. No rank has connected then.
        """
        self.announce(0, 0, deadline)
        for server, answer in enumerate(self._answers):
            keys = [inventory_key(server, rank) for rank in range(self._plan.servers[server].tensor)]
            answer.add_done_callback(functools.partial(_note_missing, self._notes, keys))
        # All come before one is refused: a rank that came later would look for the dropped store until its deadline.
        held = [
            [self._inventory(server, server_rank, deadline)["parameters"] for server_rank in range(mesh.tensor)]
            for server, mesh in enumerate(self._plan.servers)
        ]
        for server, of_server in enumerate(held):
            for server_rank, parameters in enumerate(of_server):
                shapes = {name: tuple(shape) for name, (shape, _) in parameters.items()}
                planned = self._plan.served_shapes(server, server_rank)
                problems = shape_mismatches(shapes, planned)
                if problems:
                    raise self._error(server, server_rank, "; ".join(problems) + known_cause(shapes, planned))

    def let_connect(self) -> None:
        """Let the server ranks connect, once all inventories are as planned."""
        self._store.set(GO, "")

    def announce(self, refit: int, version: int, deadline: Deadline) -> None:
        """Announce a refit to every server rank, without waiting for answers."""
        message = dataclasses.replace(self.offer.message, refit=refit, version=version, timeout_s=deadline.remaining())
        bodies: list[dict[str, Any]] = [
            {
                "serialized_named_tensors": [
                    to_payload(dataclasses.replace(message, server=server, server_rank=server_rank))
                    for server_rank in range(mesh.tensor)
                ],
                "load_format": WEIGHT_LOADER,
                # /flush_cache would also collect the server's garbage, which takes longer than a refit.
                "flush_cache": True,
            }
            for server, mesh in enumerate(self._plan.servers)
        ]
        self._answers = self._control.start_load(bodies, deadline)
        for server, answer in enumerate(self._answers):
            answer.add_done_callback(functools.partial(_note_end, self._notes, server, refit))

    def collect(self, refit: int) -> None:
        """Wait for the answers and reports of all server ranks.

        Raises:
            ServerError: names every server that failed.
        """
        errors = []
        for server, answer in enumerate(self._answers):
            try:
                answer.result()
                for server_rank in range(self._plan.servers[server].tensor):
                    self._read_report(server, server_rank, refit)
            except ServerError as error:
                errors.append(error)
        if errors:
            raise ServerError("; ".join(map(str, errors)), *(url for error in errors for url in error.urls))

    def abort(self) -> None:
        """Stop waiting for answers, and drop the store. No call may follow."""
        for answer in self._answers:
            answer.cancel()
        del self._served, self._store, self._notes

    def _inventory(self, server: int, server_rank: int, deadline: Deadline) -> dict[str, Any]:
        key = inventory_key(server, server_rank)
        try:
            self._store.wait([key], datetime.timedelta(seconds=deadline.remaining()))
        except (dist.DistStoreError, TimeoutError) as error:
            reason = f"its loader sent no inventory in {deadline.seconds:.1f} s"
            raise self._error(server, server_rank, reason) from error
        inventory: dict[str, Any] = json.loads(self._store.get(key))
        if not inventory:
            self._answers[server].result()
            self._read_report(server, server_rank, 0)
            raise self._error(server, server_rank, "its loader ended without an inventory")
        return inventory

    def _read_report(self, server: int, server_rank: int, refit: int) -> None:
        key = report_key(refit, server, server_rank)
        if not self._store.check([key]):
            raise self._error(server, server_rank, "its loader ended without a report; its log may say why")
        report = json.loads(self._store.get(key))
        self._store.delete_key(key)
        if "error" in report:
            raise self._error(server, server_rank, report["error"])

    def _error(self, server: int, server_rank: int, reason: str) -> ServerError:
        url = self.offer.urls[server]
        return ServerError(f"{url}: server rank {server_rank}: {reason}", url)


def shape_mismatches(held: dict[str, tuple[int, ...]], planned: dict[str, tuple[int, ...]]) -> list[str]:
    """List the differences between the parameters of a server rank and the plan: one text for each parameter."""
    problems = [f"{name} is not among its parameters" for name in sorted(planned.keys() - held.keys())]
    problems += [f"{name} is a parameter that the plan leaves out" for name in sorted(held.keys() - planned.keys())]
    problems += [
        f"{name} has shape {held[name]}, the plan has {planned[name]}"
        for name in sorted(held.keys() & planned.keys())
        if held[name] != planned[name]
    ]
    return problems


def known_cause(held: dict[str, tuple[int, ...]], planned: dict[str, tuple[int, ...]]) -> str:
    """Return the cause of differences and its remedy, as the end of their message; empty if it is not known."""
    different = [name for name in held.keys() | planned.keys() if held.get(name) != planned.get(name)]
    if any("shared_experts" in name for name in different):
        return _FUSION_HINT
    stacks = [name for name in different if name.endswith(".experts.w13_weight") and name in planned]
    if any(held.get(name) == (planned[name][0], *reversed(planned[name][1:])) for name in stacks):
        return _TRANSPOSED_HINT
    return ""


def _note_end(store: dist.Store, server: int, refit: int, _: Future[Any]) -> None:
    """When a server's call ends, tell those who still send to it. Runs in the control's thread."""
    with contextlib.suppress(RuntimeError):  # the store is gone, and so are those who wait
        store.set(ended_key(server), str(refit))


def _note_missing(store: dist.Store, keys: Sequence[str], _: Future[Any]) -> None:
    """When a server's call ends, write its missing inventories, so that nobody waits for them. Runs in the control's
    thread."""
    with contextlib.suppress(RuntimeError):
        for key in keys:
            store.compare_set(key, "", _NO_INVENTORY)
