"""Transformer Engine and Apex: probed here and nowhere else."""

from __future__ import annotations

import importlib.util
import logging
import sys
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_dypo.architecture import Architecture
from megatron_dypo.parallel import device

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec

_GPU_ONLY = ("transformer_engine", "apex")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Features:
    """Which optional parts are in use."""

    transformer_engine: bool
    """Layers, attention and fused Adam of Transformer Engine."""
    grad_accumulation_fusion: bool
    """Weight-gradient GEMMs add into the main gradient (Apex' ``fused_weight_gradient_mlp_cuda``)."""

    def __str__(self) -> str:
        layers = "Transformer Engine" if self.transformer_engine else "torch, padded causal attention"
        fusion = "fused (Apex)" if self.grad_accumulation_fusion else "plain"
        return f"layers: {layers}; gradient accumulation: {fusion}"


def shield_imports() -> None:
    """Hide GPU-only packages from Megatron where there is no GPU; call it before the first import of ``megatron``.

    With no GPU ``import transformer_engine`` raises RuntimeError, which Megatron's ``except ImportError`` lets through.
    PyPI's ``apex`` is another project altogether and would be taken for NVIDIA's.
    """
    # A dozen of Megatron's modules each say that they found neither; Features says once what is in use.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    # Its checkpoints go through parts of torch that are deprecated, as each tensor then says.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"megatron\.core|torch\.distributed\.checkpoint")
    for name in _GPU_ONLY:
        found = importlib.util.find_spec(name) is not None
        if found and not (device.on_gpu() and _is_nvidias(name)):
            _log.warning("%s is installed but of no use here; it is left out", name)
            sys.modules[name] = None  # type: ignore[assignment]


def probe() -> Features:
    """What can be used on this machine."""
    usable = device.on_gpu()
    return Features(
        transformer_engine=usable and importlib.util.find_spec("transformer_engine") is not None,
        grad_accumulation_fusion=usable and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
    )


def layer_spec(arch: Architecture, features: Features) -> ModuleSpec:
    """The transformer layer: Transformer Engine's, or Megatron's local one with our packed attention."""
    from megatron.core.models.gpt import gpt_layer_specs

    num_experts = arch.experts.num_experts if arch.experts else None
    if features.transformer_engine:
        spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
            num_experts=num_experts, moe_grouped_gemm=num_experts is not None, qk_layernorm=arch.qk_norm
        )
        return _with_our_router(spec, arch)
    from megatron_dypo.mcore.core_attention import PackedAttention

    spec = gpt_layer_specs.get_gpt_layer_local_spec(
        num_experts=num_experts, moe_grouped_gemm=False, qk_layernorm=arch.qk_norm, normalization="RMSNorm"
    )
    spec.submodules.self_attention.submodules.core_attention = PackedAttention
    return _with_our_router(spec, arch)


def _with_our_router(spec: ModuleSpec, arch: Architecture) -> ModuleSpec:
    if arch.experts is not None:
        from megatron_dypo.mcore.router import BalancedRouter

        spec.submodules.mlp.submodules.router = BalancedRouter
        # The local spec would store the norm before experts as fused with their input projection, TE's does not.
        spec.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    return spec


def _is_nvidias(name: str) -> bool:
    return name != "apex" or importlib.util.find_spec("apex.multi_tensor_apply") is not None
