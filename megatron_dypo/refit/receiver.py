"""The receiving end of a refit, inside SGLang: ``--custom-weight-loader megatron_dypo.refit.receiver.load``.

SGLang calls :func:`load` in the scheduler process of each server rank. This module needs only torch and the standard
library. :mod:`megatron_dypo.refit.control_message` describes what it writes to the store of a connection.
"""

from __future__ import annotations

import datetime
import functools
import json
import logging
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dypo.parallel import device
from megatron_dypo.parallel.stores import reach_store
from megatron_dypo.refit.control_message import (
    GO,
    ControlMessage,
    from_named_tensors,
    inventory_key,
    report_key,
)
from megatron_dypo.refit.deadline import Deadline
from megatron_dypo.refit.plan.refit_plan import Transfer
from megatron_dypo.refit.transports.ends import receiver_of
from megatron_dypo.refit.transports.link_receiver import LinkReceiver
from megatron_dypo.refit.transports.links import ServerLinks
from megatron_dypo.refit.transports.lost_peers import trainer_error
from megatron_dypo.refit.transports.messages import cut
from megatron_dypo.refit.transports.threads import run_concurrently, run_unless_lost

logger = logging.getLogger(__name__)


def load(model: torch.nn.Module, named_tensors: list[tuple[str, Tensor]]) -> None:
    """Open a connection, or receive one refit into the parameters of ``model``, as the message says.

    The function raises nothing, since that would end the server. It reports errors to the trainer, whose refit then
    fails.
    """
    try:
        message = from_named_tensors(named_tensors)
        store = _held.store(message)
        try:
            report: dict[str, object] = {"bytes": _held.obey(model, message, store)}
        except Exception as error:  # the trainer waits for a report of any error
            logger.exception("refit %d, version %d", message.refit, message.version)
            report = {"error": str(error) or type(error).__name__}
            _held.forget()
        key = report_key(message.refit, message.server, message.server_rank)
        store.set(key, json.dumps(report))
        store.check([key])  # set() waits for nobody, and the server's answer must not arrive before the report
    except Exception:  # there is no store to report to
        logger.exception("refit without a report")
        _held.forget()


class Session:
    """This rank's end of one connection to the trainer, and its part of the plan."""

    def __init__(self, model: torch.nn.Module, message: ControlMessage, store: dist.Store) -> None:
        """Report the parameters of this rank, and connect with all trainer ranks that send to it.

        Raises:
            ValueError: the plan is not possible.
            RuntimeError: a trainer rank did not come, or the trainer refused the inventory.
        """
        deadline = Deadline(message.timeout_s)
        self.connection = message.connection
        self._model = model
        watched = reach_store(message.store_address, datetime.timedelta(seconds=message.timeout_s))
        self._trainer_error = functools.partial(trainer_error, watched)
        self._params = {name: param.detach() for name, param in model.named_parameters()}
        store.set(inventory_key(message.server, message.server_rank), json.dumps(inventory(self._params)))
        plan = message.plan.make_plan()
        columns = plan.matrix_columns(message.server, message.server_rank)
        transfers = plan.receives(message.server, message.server_rank)
        links: dict[int, list[Transfer]] = {}
        for transfer in transfers:
            links.setdefault(transfer.source, []).append(transfer)
        # The trainer writes GO once it has found every parameter of the plan in the inventories.
        store.wait([GO], datetime.timedelta(seconds=deadline.remaining()))
        self._params |= {name: self._params[name].view(-1, width) for name, width in columns.items()}
        self._padded = self._padded_params(transfers)
        dtypes = {name: param.dtype for name, param in self._params.items()}
        self._messages = {source: list(cut(of_link, dtypes, message.slot_bytes)) for source, of_link in links.items()}
        links_here = ServerLinks(
            store=store,
            store_host=message.store_host,
            server=message.server,
            sources=plan.sources_of(message.server),
            num_server_ranks=message.plan.servers[message.server].tensor,
            peers=tuple(sorted(links)),
            most_of_a_rank=message.most_links,
            slot_bytes=message.slot_bytes,
        )
        connect = receiver_of(message.transport).connect
        self._links = run_unless_lost(
            functools.partial(connect, links_here, message.server_rank, deadline), self._trainer_error
        )

    def receive(self, message: ControlMessage) -> int:
        """Bring all parameters to the refit's version; return the number of bytes received.

        Raises:
            RuntimeError: a trainer rank was lost, or bytes changed on the way; the message names the parameters.
        """
        deadline = Deadline(message.timeout_s)
        for name in self._padded:
            self._params[name].zero_()  # SGLang has zeros where the vocabulary is padded
        receivers = [
            LinkReceiver(self._params, source, self._links.incoming(source, deadline), messages, message)
            for source, messages in self._messages.items()
        ]
        errors = run_concurrently([receiver.receive for receiver in receivers], lambda _: self._trainer_error())
        device.synchronize()
        lost = [f"from trainer rank {one.source}: {why}" for one, why in zip(receivers, errors, strict=True) if why]
        if lost:
            raise RuntimeError("; ".join(lost))
        derive_again(self._model)
        return sum(receiver.num_bytes for receiver in receivers)

    def close(self) -> None:
        """Close all links."""
        self._links.close()

    def _padded_params(self, transfers: Sequence[Transfer]) -> list[str]:
        """List the parameters that the plan does not fill."""
        missing = {name: param.numel() for name, param in self._params.items()}
        for transfer in transfers:
            missing[transfer.served_name] -= transfer.rows * transfer.cols
        return [name for name, left in missing.items() if left]


def derive_again(model: torch.nn.Module) -> None:
    """Let SGLang compute again the tensors that it derived from parameters when it loaded the model, in place.

    Multi-head latent attention has such (``w_kc`` and ``w_vc``, from ``kv_b_proj``). SGLang 0.5.23 derives them at the
    end of a session only if nothing was loaded in it (``managers/scheduler_components/weight_updater.py:330``), and a
    custom loader counts as loading. Without this, servers would sample from the old keys and values.
    """
    derive = getattr(model, "post_load_weights", None)
    if derive is not None:
        derive()
        device.synchronize()


def inventory(params: Mapping[str, Tensor]) -> dict[str, object]:
    """Return the parameters of this rank (name → shape and dtype), and kind and compute capability of its device."""
    return {
        "device": device.device_kind(),
        "capability": device.compute_capability(),
        "parameters": {n: [list(p.shape), str(p.dtype).removeprefix("torch.")] for n, p in params.items()},
    }


class _Held:
    """The state of a process between calls of :func:`load`: store and session of the last connection."""

    def __init__(self) -> None:
        self._stores: dict[str, dist.Store] = {}
        self._sessions: dict[str, Session] = {}

    def store(self, message: ControlMessage) -> dist.Store:
        """Return the trainer's store of the message's connection. A new connection replaces the previous one."""
        if message.connection not in self._stores:
            self.forget()
            timeout = datetime.timedelta(seconds=message.timeout_s)
            self._stores = {message.connection: reach_store(message.store_address, timeout)}
        return self._stores[message.connection]

    def obey(self, model: torch.nn.Module, message: ControlMessage, store: dist.Store) -> int:
        """Open the connection, or receive over it; return the number of bytes received."""
        if message.refit == 0:
            self._sessions = {message.connection: Session(model, message, store)}
            return 0
        if message.connection not in self._sessions:
            raise RuntimeError(f"connection {message.connection} is not open here (any more)")
        return self._sessions[message.connection].receive(message)

    def forget(self) -> None:
        """Close the session, and drop session and store."""
        for session in self._sessions.values():
            session.close()
        self._sessions, self._stores = {}, {}


_held = _Held()
