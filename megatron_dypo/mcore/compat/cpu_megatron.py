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

SET_MAIN_PARAM = PrivateName(
    package="megatron-core",
    module="megatron.core.optimizer.distrib_optimizer",
    name="DistributedOptimizer._set_main_param_and_optimizer_states",
    source="NVIDIA/Megatron-LM core_v0.16.1 megatron/core/optimizer/distrib_optimizer.py:911",
    oldest="0.16.1",
    takes=("model_param", "tensors"),
)
"""Copies a loaded main parameter and its moments into the optimizer."""


def patch_megatron() -> None:
    """Patch Megatron-Core for this process."""
    for private in (GET_RNG_STATE, SET_RNG_STATE, SET_MAIN_PARAM):
        private.get()
    _patch_rng_tracker()
    _patch_torch_norm()
    _patch_selective_checkpoint()
    _patch_experts()
    _patch_distributed_optimizer()


def _patch_rng_tracker() -> None:
    """Use the RNG states of the CPU instead of those of a GPU (tensor_parallel/random.py:46-107)."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, *args, **kwargs: torch.set_rng_state(new_state)
    # On each fork it warns that the CPU's state changed, which is intended here.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)


def _patch_torch_norm() -> None:
    """Allow torch's norms under sequence parallelism by marking their weights for the all-reduce.

    transformer/torch_norm.py:36 refuses them because that mark is missing.
    """
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    def new_norm(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any) -> torch.nn.Module:
        norm_class = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = norm_class(hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm

    WrappedTorchNorm.__new__ = staticmethod(new_norm)


def _patch_selective_checkpoint() -> None:
    """Pass None for ``fp8=False``: tensor_parallel/random.py:636 treats False as FP8, which needs Transformer
    Engine."""
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    upstream_init = CheckpointWithoutOutput.__init__

    def init(self: Any, fp8: Any = None) -> None:
        upstream_init(self, fp8 or None)

    CheckpointWithoutOutput.__init__ = init


def _patch_experts() -> None:
    """Run a mixture of experts without Transformer Engine and streams.

    transformer/moe/moe_utils.py:1192,1224 reads a name that only an import of Transformer Engine makes.
    transformer/moe/token_dispatcher.py:445,871-899 copies counts to the host on a separate stream.
    """
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    class Stream:
        """A stream that does nothing, since work on a CPU is in order."""

        def wait_stream(self, other: Any) -> None: ...

        def record_event(self, event: Any = None) -> Any:
            return self

        def synchronize(self) -> None: ...

    only_stream = Stream()

    def on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.te_general_gemm = None
    token_dispatcher.maybe_move_tensor_to_cpu = on_host
    torch.cuda.Stream = lambda *args, **kwargs: only_stream  # type: ignore[assignment,misc]
    torch.cuda.current_stream = lambda device=None: only_stream  # type: ignore[assignment,return-value]
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment,return-value]


def _patch_distributed_optimizer() -> None:
    """Make save and resume of the distributed optimizer work with torch's AdamW, which keeps a ``step`` tensor.

    optimizer/distrib_optimizer.py:640-642 needs states that exist only after the first step. :818-825 gives all
    parameters one shared ``step`` tensor, which then advances once for each parameter. :936-940 copies ``step`` too,
    and writes into leaves that require gradients.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    upstream_state_dict = DistributedOptimizer.state_dict
    upstream_load_state_dict = DistributedOptimizer.load_state_dict

    def state_dict(self: Any) -> Any:
        if not self.optimizer.state:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    self.optimizer.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
        return upstream_state_dict(self)

    def load_state_dict(self: Any, state_dict: Any) -> None:
        upstream_load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    @torch.no_grad()
    def set_main_param_and_optimizer_states(self: Any, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        group_index, group_order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group_index]["params"][group_order]
        for key, value in {"param": main_param, **self.optimizer.state[main_param]}.items():
            if key in tensors and key != "step":
                value.copy_(tensors[key])

    DistributedOptimizer.state_dict = state_dict
    DistributedOptimizer.load_state_dict = load_state_dict
    DistributedOptimizer._set_main_param_and_optimizer_states = set_main_param_and_optimizer_states
