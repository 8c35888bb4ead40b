"""Patches of Megatron itself with which Megatron-Core trains on CPUs over gloo. See ``cpu.py``."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch

from megatron_dypo.mcore.compat.private_name import PrivateName

GET_RNG_STATE, SET_RNG_STATE = (
    PrivateName(
        package="megatron-core",
        module="megatron.core.tensor_parallel.random",
        name=f"_{verb}_cuda_rng_state",
        source=f"NVIDIA/Megatron-LM core_v0.16.1 megatron/core/tensor_parallel/random.py:{line}",
        oldest="0.16.1",
    )
    for verb, line in (("get", 41), ("set", 72))
)
"""Read and set the RNG state of a GPU."""


def patch_megatron() -> None:
    """Patch Megatron-Core for this process."""
    for private in (GET_RNG_STATE, SET_RNG_STATE):
        private.get()
    _patch_rng_tracker()
    _patch_streams()


def _patch_rng_tracker() -> None:
    """Use the RNG states of the CPU instead of those of a GPU (tensor_parallel/random.py:46-107)."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, *args, **kwargs: torch.set_rng_state(new_state)
    # On each fork it warns that the CPU's state changed, which is intended here.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)


def _patch_streams() -> None:
    """Run a mixture of experts without streams.

    transformer/moe/token_dispatcher.py:445,871-899 copies counts to the host on a separate stream.
    """
    from megatron.core.transformer.moe import token_dispatcher

    class Stream:
        """A stream that does nothing, since work on a CPU is in order."""

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

        def wait_stream(self, other: Any) -> None: ...

        def record_event(self, event: Any = None) -> Any:
            return self

        def synchronize(self) -> None: ...

    only_stream = Stream()

    def on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = on_host
    torch.cuda.Stream = Stream  # type: ignore[assignment,misc]
    torch.cuda.current_stream = lambda device=None: only_stream  # type: ignore[assignment,return-value]
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment,return-value]
