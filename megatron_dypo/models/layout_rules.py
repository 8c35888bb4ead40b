"""Which layouts are refused for a model, and why: before anything is built, without torch and Megatron.

Rules between the axes alone are those of ``ParallelConfig``, of layers and stages those of ``PipelineCut``; that between axes
and world is in ``init_layout``. What Megatron allows but gets wrong is not offered: the model's settings choose p2p for
interleaving that is not batched.
"""

from __future__ import annotations

from megatron_dypo.checks import require
from megatron_dypo.config.fp8 import Fp8Config
from megatron_dypo.config.tree import ParallelConfig
from megatron_dypo.models.architecture import Architecture


def check_layout(arch: Architecture, parallel: ParallelConfig) -> None:
    """Whether the axes suit the architecture; context parallelism suits any, as sequences are padded to it.

    Raises:
        ValueError: e.g. ``parallel.tensor=3 does not divide num_attention_heads=28``.
    """
    for axis, size, name, value in (
        ("parallel.tensor", parallel.tensor, "num_attention_heads", arch.num_attention_heads),
        ("parallel.tensor", parallel.tensor, "num_key_value_heads", arch.num_key_value_heads),
        ("parallel.tensor", 1 if arch.experts else parallel.tensor, "intermediate_size", arch.ffn_hidden_size),
    ):
        if value % size:
            raise ValueError(f"{axis}={size} does not divide {name}={value}")
    parallel.cut.stage_layers(arch.num_layers)
    width = arch.padded_vocab_size(parallel.tensor) // parallel.tensor
    if width * (parallel.tensor - 1) >= arch.vocab_size:
        raise ValueError(
            f"parallel.tensor={parallel.tensor}: of vocab_size={arch.vocab_size}, {width} entries a rank, "
            "the last rank would have none"
        )
    _check_experts(arch, parallel)


def check_fp8_sizes(arch: Architecture, parallel: ParallelConfig, fp8: Fp8Config) -> None:
    """Whether the shards of the linear layers suit the recipe.

    Raises:
        ValueError: e.g. ``model.fp8.recipe=mxfp8: intermediate_size / parallel.tensor = 48: must be a multiple of 32``.
    """
    if not fp8.is_on:
        return
    granule, tensor = fp8.row_multiple, parallel.tensor
    width, key_values = arch.num_attention_heads * arch.head_dim, arch.num_key_value_heads * arch.head_dim
    sizes = {
        "hidden_size": arch.hidden_size,
        "width of attention heads / parallel.tensor": width // tensor,
        "width of queries, keys and values / parallel.tensor": (width + 2 * key_values) // tensor,
    }
    if arch.experts is None:
        sizes["intermediate_size / parallel.tensor"] = arch.ffn_hidden_size // tensor
    else:
        sizes["moe_intermediate_size / parallel.expert_tensor"] = arch.experts.ffn_hidden_size // parallel.expert_tensor
    for name, size in sizes.items():
        require(
            size % granule == 0, f"model.fp8.recipe={fp8.recipe}: {name} = {size}", f"must be a multiple of {granule}"
        )
    per_stage = arch.num_layers // parallel.pipeline  # Megatron's limit, also where stages differ
    for name in ("first_layers_bf16", "last_layers_bf16"):
        value = getattr(fp8, name)
        require(
            value <= per_stage, f"model.fp8.{name}={value}", f"must not exceed a pipeline stage's {per_stage} layers"
        )


def _check_experts(arch: Architecture, parallel: ParallelConfig) -> None:
    if arch.experts is None:
        for axis, size in (("parallel.expert", parallel.expert), ("parallel.expert_tensor", parallel.expert_tensor)):
            if size > 1:
                raise ValueError(f"{axis}={size}: a {arch.family} model has no experts")
        return
    if arch.experts.num_experts % parallel.expert:
        raise ValueError(f"parallel.expert={parallel.expert} does not divide num_experts={arch.experts.num_experts}")
    if arch.experts.ffn_hidden_size % parallel.expert_tensor:
        raise ValueError(
            f"parallel.expert_tensor={parallel.expert_tensor} does not divide "
            f"moe_intermediate_size={arch.experts.ffn_hidden_size}"
        )
    if parallel.tensor > 1 and not parallel.sequence:
        raise ValueError(
            f"parallel.tensor={parallel.tensor}: a mixture of experts needs parallel.sequence=true with it "
            "(Megatron refuses to train one otherwise)"
        )
