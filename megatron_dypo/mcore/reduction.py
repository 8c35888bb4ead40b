"""The reduction of gradients at the end of Megatron's schedule: left out, or timed until it begins."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from megatron_dypo.mcore.chunks import unwrap
from megatron_dypo.parallel.device import synchronize_stream


@dataclass(kw_only=True)
class Busy:
    """A time that :func:`until_reduction` measures."""

    seconds: float = 0.0


@contextmanager
def until_reduction(chunks: Sequence[torch.nn.Module]) -> Iterator[Busy]:
    """Measure the time from now until Megatron's schedule reduces the gradients, at its end.

    Ranks of one replica wait for each other inside of the passes, so all ranks of a slow replica are slow.
    """
    config, busy, begun_at = unwrap(chunks[0]).config, Busy(), time.perf_counter()
    finalize: Any = config.finalize_model_grads_func

    def measured(*args: Any, **kwargs: Any) -> None:
        synchronize_stream()
        busy.seconds = time.perf_counter() - begun_at
        finalize(*args, **kwargs)

    config.finalize_model_grads_func = measured
    try:
        yield busy
    finally:
        config.finalize_model_grads_func = finalize


@contextmanager
def local_gradients(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Keep the gradients of this rank alone in DDP's buffers: nothing is summed over ranks or replicas."""
    config, settings = unwrap(chunks[0]).config, [chunk.ddp_config for chunk in chunks]
    finalize, overlaps = config.finalize_model_grads_func, [setting.overlap_grad_reduce for setting in settings]  # type: ignore[union-attr]
    config.finalize_model_grads_func = None
    for setting in settings:
        setting.overlap_grad_reduce = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        config.finalize_model_grads_func = finalize
        for setting, overlap in zip(settings, overlaps, strict=True):
            setting.overlap_grad_reduce = overlap  # type: ignore[union-attr]


def zero_gradients(chunks: Sequence[torch.nn.Module]) -> None:
    """Set all gradients of this rank to zero."""
    for chunk in chunks:
        chunk.zero_grad_buffer()  # type: ignore[operator]
        for parameter in chunk.parameters():
            parameter.grad = None  # an fp32 optimizer leaves it as another name of the buffer, which would count twice
