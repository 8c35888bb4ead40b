"""The leader's side of planned refits: which servers there are, what each is told, and what it answers."""

from __future__ import annotations

import dataclasses
import json
import time
from concurrent.futures import Future
from typing import Any

import torch.distributed as dist

from megatron_dypo.refit.control import ServerError, ServerInfo, SGLangControl
from megatron_dypo.refit.control_message import ControlMessage, to_payload
from megatron_dypo.refit.deadline import Deadline
from megatron_dypo.refit.plan.plan import RefitPlan, ServerMesh
from megatron_dypo.refit.receiver import inventory_key, report_key
from megatron_dypo.rollout.server.command import WEIGHT_LOADER

_POLL_S = 0.002


def server_mesh(info: ServerInfo) -> ServerMesh:
    """The layout of a server that planned refits can reach.

    Raises:
        ServerError: one that they cannot.
    """
    for name in ("pipeline_parallel", "data_parallel"):
        size = getattr(info, name)
        if size != 1:
            raise ServerError(f"{info.url}: {name}={size}: planned refits need 1; use transport=disk", info.url)
    if WEIGHT_LOADER not in info.custom_loaders:
        raise ServerError(
            f"{info.url}: custom_weight_loader={list(info.custom_loaders)}: start the server with "
            f"--custom-weight-loader {WEIGHT_LOADER}, or use transport=broadcast",
            info.url,
        )
    return ServerMesh(tensor=info.tensor_parallel, expert=info.expert_parallel)


class ServerRanks:
    """All ranks of the servers of one connection."""

    def __init__(self, control: SGLangControl, store: dist.Store, plan: RefitPlan) -> None:
        self._control = control
        self._store = store
        self._plan = plan
        self._answers: list[Future[dict[str, Any]]] = []

    def start(self, message: ControlMessage, deadline: Deadline) -> None:
        """Tell every rank of every server of a refit, each at its own place; does not wait for them."""
        bodies: list[dict[str, Any]] = [
            {
                "serialized_named_tensors": [
                    to_payload(dataclasses.replace(message, server=server, server_rank=server_rank))
                    for server_rank in range(layout.tensor)
                ],
                "load_format": WEIGHT_LOADER,
                # Here, not by /flush_cache: that one also collects the server's garbage, which takes longer than a refit.
                "flush_cache": True,
            }
            for server, layout in enumerate(self._plan.servers)
        ]
        self._answers = self._control.start_load(bodies, deadline)

    def check_inventories(self, refit: int, deadline: Deadline) -> None:
        """Wait until every rank has said what it holds, and hold that against the plan.

        Raises:
            ServerError: a rank that failed, or whose parameters are not those of the plan: nothing was sent to any.
        """
        for server, server_rank in self._ranks():
            parameters = self._inventory(server, server_rank, refit, deadline)["parameters"]
            shapes = {name: tuple(shape) for name, (shape, _) in parameters.items()}
            problems = differences(shapes, self._plan.served_shapes(server, server_rank))
            if problems:
                raise self._error(server, server_rank, "; ".join(problems))

    def collect(self, refit: int) -> None:
        """Wait for the answers and reports of all.

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

    def close(self) -> None:
        """Wait for no more answers."""
        for answer in self._answers:
            answer.cancel()

    def _ranks(self) -> list[tuple[int, int]]:
        return [(e, server_rank) for e, layout in enumerate(self._plan.servers) for server_rank in range(layout.tensor)]

    def _inventory(self, server: int, server_rank: int, refit: int, deadline: Deadline) -> dict[str, Any]:
        key = inventory_key(server, server_rank)
        while not self._store.check([key]):
            if self._answers[server].done():
                self._answers[server].result()
            if self._answers[server].done() or self._store.check([report_key(refit, server, server_rank)]):
                self._read_report(server, server_rank, refit)
            if deadline.has_passed():
                raise self._error(server, server_rank, f"its loader sent no inventory in {deadline.seconds:.1f} s")
            time.sleep(_POLL_S)
        inventory: dict[str, Any] = json.loads(self._store.get(key))
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
        url = self._control.urls[server]
        return ServerError(f"{url}: tensor-parallel rank {server_rank}: {reason}", url)


def differences(held: dict[str, tuple[int, ...]], planned: dict[str, tuple[int, ...]]) -> list[str]:
    """What a server's rank has otherwise than the plan says, as sentences; at most one for each tensor."""
    problems = [f"{name} is not among its parameters" for name in sorted(planned.keys() - held.keys())]
    problems += [f"{name} is a parameter that the plan leaves out" for name in sorted(held.keys() - planned.keys())]
    problems += [
        f"{name} has shape {held[name]}, the plan says {planned[name]}"
        for name in sorted(held.keys() & planned.keys())
        if held[name] != planned[name]
    ]
    return problems
