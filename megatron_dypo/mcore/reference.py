"""π_ref as a CPU copy of this rank's weights, which is swapped into the model for a forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from megatron_dypo.mcore.chunks import named_global_weights
from megatron_dypo.mcore.fp8 import forget_quantized_weights, values
from megatron_dypo.mcore.param_gather import finish_gather
from megatron_dypo.parallel import device


class ReferencePolicy:
    """A second set of weights without a second model.

    It costs one CPU copy of this rank's parameters; a swap needs one more tensor of the largest parameter's size, on
    the GPU. There the copy is pinned, and both directions of an exchange are queued on one stream: no parameter waits
    for the CPU.
    Weights are copied in place, so that the buffers of DDP and of the distributed optimizer stay valid, and are
    restored bit for bit.

    FP8: at both ends of the block, Transformer Engine must quantise its weights again. If FP8 is the only copy
    (``Fp8Config.param_gather``), a second rounding would not restore the weights exactly; ``rewrite`` does.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], *, rewrite: Callable[[], None] | None = None) -> None:
        """Capture the weights that the chunks hold now.

        Args:
            rewrite: fills the parameters from the optimizer's main parameters; needed if parameters are quantised.
                Collective over the world.
        """
        self._chunks, self._rewrite = chunks, rewrite
        self._parameters = [parameter for _, parameter in named_global_weights(chunks)]
        self._stored = [
            torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu", pin_memory=device.on_gpu())
            for parameter in self._parameters
        ]
        self._is_in = False
        self.capture()

    @torch.no_grad()
    def capture(self) -> None:
        """Make the current policy the reference."""
        assert not self._is_in, "the reference itself is in the model"
        finish_gather(self._chunks)
        for stored, parameter in zip(self._stored, self._parameters, strict=True):
            stored.copy_(values(parameter), non_blocking=True)
        device.synchronize_stream()

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Make the model π_ref inside the block, and the policy again after it, also after an error.

        Use it only for forward passes: an optimizer step inside would be lost.
        """
        assert not self._is_in, "the reference is in the model already"
        finish_gather(self._chunks)
        exchanged = 0
        self._is_in = True
        try:
            for index in range(len(self._parameters)):
                self._exchange(index)
                exchanged += 1
            device.synchronize_stream()
            forget_quantized_weights(self._chunks)
            yield
        finally:
            for index in range(exchanged):
                self._exchange(index)
            device.synchronize_stream()
            if self._rewrite is not None:
                self._rewrite()
            forget_quantized_weights(self._chunks)
            self._is_in = False

    @torch.no_grad()
    def _exchange(self, index: int) -> None:
        stored, parameter = self._stored[index], self._parameters[index]
        policy = values(parameter).clone()
        parameter.copy_(stored, non_blocking=True)
        stored.copy_(policy, non_blocking=True)
