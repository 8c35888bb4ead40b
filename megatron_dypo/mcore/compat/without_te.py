"""Patches of Megatron-Core with which it trains without Transformer Engine, on CPUs and on GPUs.

Each names the upstream lines (of 0.16.1) that it works around, with paths relative to ``megatron/core``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from megatron_dypo.mcore.compat.private_name import PrivateName
from megatron_dypo.mcore.zero_centered import ZeroCenteredLayerNorm, ZeroCenteredRMSNorm

SET_MAIN_PARAM = PrivateName(
    package="megatron-core",
    module="megatron.core.optimizer.distrib_optimizer",
    name="DistributedOptimizer._set_main_param_and_optimizer_states",
    source="NVIDIA/Megatron-LM core_v0.16.1 megatron/core/optimizer/distrib_optimizer.py:911",
    oldest="0.16.1",
    takes=("model_param", "tensors"),
)
"""Copies a loaded main parameter and its moments into the optimizer."""

_PLAIN = (torch.nn.LayerNorm, torch.nn.RMSNorm)
_ZERO_CENTERED = (ZeroCenteredLayerNorm, ZeroCenteredRMSNorm)


@functools.cache
def install() -> None:
    """Patch Megatron-Core for this process, in which Transformer Engine is not used; a second call does nothing."""
    from megatron.core import optimizer

    SET_MAIN_PARAM.get()
    _patch_torch_norm()
    _patch_selective_checkpoint()
    _patch_experts()
    _patch_latent_attention()
    if optimizer.USING_PYTORCH_OPTIMIZER:  # otherwise Megatron has found Apex
        _patch_distributed_optimizer()


def _patch_torch_norm() -> None:
    """Allow torch's norms under sequence parallelism by marking their weights for the all-reduce, and weights that are
    stored minus one.

    transformer/torch_norm.py:36 refuses the first because that mark is missing; :30 refuses the second.
    """
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    def new_norm(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any) -> torch.nn.Module:
        classes = _ZERO_CENTERED if config.layernorm_zero_centered_gamma else _PLAIN
        norm: torch.nn.Module = classes[config.normalization == "RMSNorm"](hidden_size, eps=eps)
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
    """Define a name that only an import of Transformer Engine makes (transformer/moe/moe_utils.py:1192,1224)."""
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None


def _patch_latent_attention() -> None:
    """Say that Transformer Engine is not there: transformer/multi_latent_attention.py:183-186 asks for an instance of
    None otherwise, since the module that it imports from loads without Transformer Engine too."""
    from megatron.core.transformer import multi_latent_attention

    multi_latent_attention.HAVE_TE = False


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
