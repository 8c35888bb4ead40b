"""Which parameter and which samples made an update that is not finite. Called by all ranks, on that rare occasion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from megatron_dypo.loop.logprobs import logprobs_of_all
from megatron_dypo.loop.run import Leader, Run
from megatron_dypo.mcore.chunks import named_global_parameters
from megatron_dypo.mcore.fp8 import values
from megatron_dypo.parallel.collectives import broadcast_object, gather_objects, gather_world
from megatron_dypo.types import Sample

_SHOWN = 3


def bad_weight(chunks: Sequence[torch.nn.Module]) -> str | None:
    """Name the first parameter that holds a value that is not finite; None if all are. Collective over the world."""
    return _first(chunks, values)


def explain_bad_update(run: Run, samples: Sequence[Sample]) -> tuple[str, bool]:
    """Name the first parameter, weight or gradient, and the first samples that are not finite. Collective over the world.

    Args:
        samples: of this replica's update, the same on each of its ranks.

    Returns:
        What was found in words, and whether a weight itself is not finite.
    """
    weight = bad_weight(run.chunks)
    gradient = None if weight else _first(run.chunks, lambda parameter: parameter.main_grad)
    if weight or gradient:
        where = f"weight {weight}" if weight else f"gradient of {gradient}"
    else:
        where = "only the norm of all gradients together"
    return f"the first that is not finite: {where}; {_bad_samples(run, samples)}", weight is not None


def _first(chunks: Sequence[torch.nn.Module], read: Callable[[Any], torch.Tensor]) -> str | None:
    own = next((name for name, p in named_global_parameters(chunks) if not bool(torch.isfinite(read(p)).all())), None)
    return next((name for name in gather_world(own) if name is not None), None)


def _bad_samples(run: Run, samples: Sequence[Sample]) -> str:
    logprobs = logprobs_of_all(run, samples)
    words = ""
    if run.leader:
        bad = {s.order for s, logp_R in zip(samples, logprobs or (), strict=True) if not np.isfinite(logp_R).all()}
        orders = sorted(order for part in gather_objects(sorted(bad), run.leader.group) for order in part)
        total = sum(gather_objects(len({sample.order for sample in samples}), run.leader.group))
        words = _describe(run.leader, sorted(set(orders)), total)
    return broadcast_object(words, run.layout.replica_group)


def _describe(leader: Leader, orders: Sequence[int], total: int) -> str:
    if not orders:
        return f"the log-probs of all {total} prompts of the update are finite"
    shown = ", ".join(leader.stream.id_of(order) for order in orders[:_SHOWN])
    more = f" and {len(orders) - _SHOWN} more" if len(orders) > _SHOWN else ""
    return f"log-probs are not finite for {len(orders)} of {total} prompts: {shown}{more}"
