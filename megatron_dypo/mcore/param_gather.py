"""Updated parameters that are gathered while other work goes on (``optimizer.overlap_param_gather``).

After an update each rank has new values for its share of the parameters. Megatron's hooks would gather the rest in the
next forward pass, and until then other readers of the weights would see old values. Here the step itself begins all
gathers (:func:`begin_gather`). A forward pass waits for each module's parameters when it comes to the module, and
every other reader waits for all (:func:`finish_gather`), which is not collective.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel


def keep_whole(chunks: Sequence[torch.nn.Module]) -> None:
    """Tell Megatron that all parameters are whole, so that no forward pass gathers them."""
    for group in _groups(chunks):
        group.param_gather_dispatched = True


def begin_gather(chunks: Sequence[torch.nn.Module]) -> None:
    """Begin to gather all parameters, first those that a forward pass needs first. Collective over the replicas."""
    for group in _groups(chunks):
        group.start_param_sync()


def finish_gather(chunks: Sequence[torch.nn.Module]) -> None:
    """Wait until all parameters that are being gathered are here."""
    for group in _groups(chunks):
        if group.param_gather_handle is not None:
            group.finish_param_sync(skip_next_bucket_dispatch=True)


def finish_one(chunk: DistributedDataParallel, parameter: torch.Tensor) -> None:
    """Wait until one parameter of the chunk, if it is being gathered, is here."""
    group = chunk.param_to_bucket_group[parameter]
    if group.param_gather_handle is not None:
        group.finish_param_sync(skip_next_bucket_dispatch=True)


def _groups(chunks: Sequence[torch.nn.Module]) -> Iterator[Any]:
    """Yield the bucket groups whose gathers overlap; their order is that of the backward pass, reversed."""
    for chunk in chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            yield from reversed(chunk.bucket_groups)
            yield from reversed(chunk.expert_parallel_bucket_groups)
