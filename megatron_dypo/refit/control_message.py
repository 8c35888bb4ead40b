"""The message that tells each server rank of a refit, and the keys of the store on which both ends write.

The message is plain data. SGLang gives a custom loader only names and tensors, so the message is sent as the name of an
empty tensor in SGLang's update from tensors.

On the store of a connection:
    inventory  written once by each server rank, before anything is sent: the parameters that the model has
    go         written by the trainer once it has compared all inventories with the plan
    report     written by each server rank once the connection is open, and after each refit: bytes received, or the
               error
    ended      written by the trainer for each server: number of the last refit whose call to it has ended
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import pickle
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.experts import experts_from_data
from megatron_dypo.models.hf.rope_scaling import rope_scaling_from_data
from megatron_dypo.models.latent_attention import LatentAttention
from megatron_dypo.models.quantized.names import Quantization
from megatron_dypo.models.windows import windows_from_data
from megatron_dypo.parallel.stores import StoreAddress
from megatron_dypo.refit.checksums import Verify
from megatron_dypo.refit.plan.refit_plan import Mesh, RefitPlan, ServerMesh, make_plan

PROTOCOL = 10
"""Number of the protocol: this message, and the data on the store and the links. Both sides must have the same."""

GO = "go"


@dataclass(frozen=True, kw_only=True)
class PlanInputs:
    """Everything that determines the plan."""

    arch: Architecture
    source: Mesh
    servers: tuple[ServerMesh, ...]
    quantization: Quantization
    element_size: int

    def make_plan(self) -> RefitPlan:
        """Compute the plan. Raises ValueError for sizes that do not suit the architecture."""
        return make_plan(
            self.arch, self.source, self.servers, quantization=self.quantization, element_size=self.element_size
        )


@dataclass(frozen=True, kw_only=True)
class ControlMessage:
    """The message to one server rank about one refit."""

    plan: PlanInputs
    server: int
    server_rank: int
    """Tensor-parallel rank of the server."""
    transport: str
    store_host: str
    store_port: int
    store_key: str = field(default="", repr=False)
    """Key of the door in front of the store; empty if trainer and servers share a host."""
    connection: str
    """Name of the connection; its links stay open between refits."""
    slot_bytes: int
    """Largest size of one message on a link."""
    most_links: int
    """Number of links of the rank, of trainer and all servers, that has the most."""
    refit: int
    """Number of the refit on this connection, from 1. 0 opens the connection and sends nothing."""
    version: int
    verify: Verify
    timeout_s: float

    @property
    def store_address(self) -> StoreAddress:
        """The place of the trainer's store."""
        return StoreAddress(host=self.store_host, port=self.store_port, key=self.store_key)

    def to_json(self) -> str:
        """Return the message as text."""
        return json.dumps({"protocol": PROTOCOL, **dataclasses.asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> ControlMessage:
        """Read the message that :meth:`to_json` wrote.

        Raises:
            ValueError: the trainer speaks another protocol.
        """
        fields = json.loads(text)
        protocol = fields.pop("protocol")
        if protocol != PROTOCOL:
            raise ValueError(f"protocol={protocol}: this server has {PROTOCOL}: install the trainer's megatron_dypo")
        return cls(**{**fields, "plan": _plan_inputs(fields["plan"])})


def inventory_key(server: int, server_rank: int) -> str:
    """Return the key of a server rank's inventory."""
    return f"inventory/{server}/{server_rank}"


def report_key(refit: int, server: int, server_rank: int) -> str:
    """Return the key of a server rank's report on a refit."""
    return f"report/{refit}/{server}/{server_rank}"


def ended_key(server: int) -> str:
    """Return the key of the last refit whose call to a server has ended."""
    return f"ended/{server}"


def to_payload(message: ControlMessage) -> str:
    """Encode a message for SGLang's ``serialized_named_tensors``: base64 of a pickle of [(name, tensor)].

    The pickle names only ``torch.Tensor``, which SGLang allows. That of a tensor as such would name the function by
    which Megatron-Core 0.17 and later replace a function of torch's; SGLang refuses that, and the server ends.
    """
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream)
    pickler.dispatch_table = {Tensor: lambda _: (Tensor, ())}
    pickler.dump([(message.to_json(), torch.empty(0))])
    return base64.b64encode(stream.getvalue()).decode()


def from_named_tensors(named_tensors: list[tuple[str, Tensor]]) -> ControlMessage:
    """Read the message from the names and tensors that SGLang hands to a custom loader."""
    ((text, _),) = named_tensors
    return ControlMessage.from_json(text)


def _plan_inputs(fields: dict[str, Any]) -> PlanInputs:
    arch = dict(fields["arch"])
    arch["rope_scaling"] = rope_scaling_from_data(arch["rope_scaling"])
    arch["experts"] = experts_from_data(arch["experts"])
    arch["latent"] = None if arch["latent"] is None else LatentAttention(**arch["latent"])
    arch["windows"] = windows_from_data(arch["windows"])
    servers = tuple(ServerMesh(**server) for server in fields["servers"])
    source = Mesh(**fields["source"])
    return PlanInputs(**{**fields, "arch": Architecture(**arch), "source": source, "servers": servers})
