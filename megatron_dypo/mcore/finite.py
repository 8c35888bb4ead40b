"""The search for values that are not finite: in parameters and gradients, and in a microbatch that runs alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_dypo.mcore.chunks import main_grad, named_global_parameters, unwrap
from megatron_dypo.mcore.forward_step import loss_pass
from megatron_dypo.mcore.logprobs import pack_alone
from megatron_dypo.mcore.reduction import local_gradients, zero_gradients
from megatron_dypo.mcore.routing_replay import RoutingReplay
from megatron_dypo.objective.recipes.base import Objective
from megatron_dypo.parallel.collectives import any_rank, gather_world
from megatron_dypo.parallel.device import device
from megatron_dypo.parallel.groups import MeshRank
from megatron_dypo.types import Sample

Named = Iterable[tuple[str, torch.Tensor]]
"""Tensors of this rank with their names in the whole model, such as weights or gradients."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Lone:
    """The parts of a policy that run one microbatch alone."""

    chunks: Sequence[torch.nn.Module]
    objective: Objective
    layout: MeshRank
    token_multiple: int
    """``Config.token_multiple``."""
    replay: RoutingReplay | None = None


@dataclass(kw_only=True)
class Activations:
    """The first output of a module of this rank that is not finite."""

    first: str = ""
    """The module, by its name in the whole model; empty if all outputs were finite."""
    token: int = -1
    """Index in the microbatch of the first such token; −1 if it is not known."""
    sample: int = -1
    """Index of the sample that has the token; −1: padding, or not known."""
    position: int = -1
    """Position of the token in its sample."""


@dataclass(frozen=True, kw_only=True)
class LoneRun:
    """The values of this rank that were not finite in one microbatch."""

    sums: Sequence[str]
    """Sums of the loss (on the last stage)."""
    gradients: Sequence[str]
    """Parameters."""
    activations: Activations = field(default_factory=Activations)


def named_gradients(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the gradients of this rank's parameters. The other weights, the router biases, have none."""
    return ((name, main_grad(parameter)) for name, parameter in named_global_parameters(chunks))


def names_not_finite(named: Named) -> list[str]:
    """Return the names of the tensors with a value that is not finite.

    Each tensor is read once, and the CPU waits for a GPU once. The least and the greatest value of a tensor are NaN if
    one of its values is.
    """
    names, extremes = list[str](), list[torch.Tensor]()
    for name, tensor in named:
        if tensor.numel():
            names.append(name)
            extremes.append(torch.stack(torch.aminmax(tensor.detach())))
    if not names:
        return []
    are_finite: list[bool] = torch.isfinite(torch.stack(extremes)).all(dim=1).tolist()
    return [name for name, is_finite in zip(names, are_finite, strict=True) if not is_finite]


def first_not_finite(named: Named) -> str | None:
    """Return the first tensor of the whole model with a value that is not finite. Collective over the world."""
    mine = names_not_finite(named)[:1]
    if not any_rank(bool(mine)):
        return None
    return next(names[0] for names in gather_world(mine) if names)


def bad_microbatches(lone: Lone, samples: Sequence[Sample], bins: Sequence[Sequence[int]]) -> list[int]:
    """Run each microbatch alone, and return the indices of those with a loss or a gradient that is not finite.

    Collective over the world. All ranks of a replica pass the same samples, and return the same. The gradients in DDP's
    buffers are lost.
    """
    bad = []
    for index, members in enumerate(bins):
        found = run_alone(lone, [samples[i] for i in members])
        flag = torch.tensor([float(bool(found.sums or found.gradients))], device=device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=lone.layout.replica_group)
        if flag.item():
            bad.append(index)
    zero_gradients(lone.chunks)
    return bad


def run_alone(lone: Lone, samples: Sequence[Sample], *, watches_activations: bool = False) -> LoneRun:
    """Run one microbatch forward and backward, and return what was not finite. Collective over the replica."""
    layout, chunks = lone.layout, lone.chunks
    parts = pack_alone(
        samples,
        layout,
        token_multiple=lone.token_multiple,
        streams=lone.objective.streams,
        replay=lone.replay,
    )
    activations = Activations()
    with ExitStack() as stack:
        stack.enter_context(local_gradients(chunks))
        if watches_activations:
            stack.enter_context(_watching(chunks, activations, len(parts[0].tokens_T)))
        zero_gradients(chunks)
        sums = loss_pass(chunks, parts, objective=lone.objective, context_group=layout.cp_group)
    if activations.token >= 0:
        activations.sample = int(parts[0].sample_T[activations.token])
        activations.position = int(parts[0].positions_T[activations.token])
    return LoneRun(
        sums=[name for name, value in sums.items() if not math.isfinite(value)],
        gradients=names_not_finite(named_gradients(chunks)),
        activations=activations,
    )


@contextmanager
def _watching(chunks: Sequence[torch.nn.Module], found: Activations, num_tokens: int) -> Iterator[None]:
    """Record the first output of a module that is not finite, in the order of the computation."""

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if not found.first and not bool(torch.isfinite(tensor).all()):
                    found.first, found.token = name, _first_token(tensor, num_tokens)

        return hook

    handles = [
        module.register_forward_hook(hook_of(name)) for chunk in chunks for name, module in _named_modules(chunk)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _tensors(part)


def _first_token(tensor: torch.Tensor, num_tokens: int) -> int:
    """Return the first token of ``tensor`` that is not finite; −1 unless its first axis is the tokens."""
    if not tensor.dim() or tensor.shape[0] != num_tokens:
        return -1
    bad_T = ~torch.isfinite(tensor).reshape(num_tokens, -1).all(dim=1)
    return int(bad_T.nonzero()[0])


def _named_modules(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield the modules of a chunk, whose names have the global index of their layer."""
    model: Any = unwrap(chunk)
    first = {str(index): str(layer.layer_number - 1) for index, layer in enumerate(model.decoder.layers)}
    for name, module in model.named_modules():
        head, separator, tail = name.partition("decoder.layers.")
        if separator:
            local, dot, rest = tail.partition(".")
            name = f"{head}{separator}{first[local]}{dot}{rest}"
        if name:
            yield name, module
