"""Rules between a model and the axes of the mesh. They are checked before anything is built, without torch or Megatron.

Rules among the axes, and between axes and number of ranks, are in ``ParallelConfig`` and ``Mesh``. One combination that
Megatron accepts but computes wrongly cannot be configured: ``mcore/model.py`` never batches the p2p communication of an
interleaved schedule.
"""

from __future__ import annotations

from megatron_dypo.checks import require, require_divides
from megatron_dypo.config.fp8 import Fp8Config
from megatron_dypo.config.model import ParallelConfig
from megatron_dypo.models.architecture import Architecture


def check_layout(arch: Architecture, parallel: ParallelConfig) -> None:
    """Check that the axes suit the architecture. Context parallelism always does, since sequences are padded.

    Raises:
        ValueError: e.g. ``parallel.tensor=3 does not divide num_attention_heads=28``.
    """
    check_tensor_parallel(arch, parallel.tensor, axis="parallel.tensor")
    parallel.mesh().stage_layers(arch.num_layers)
    require(
        not arch.is_bridged or arch.vocab_size % parallel.tensor == 0,
        f"parallel.tensor={parallel.tensor}",
        f"does not divide vocab_size={arch.vocab_size}, as it must with model.family=bridge",
    )
    width = arch.padded_vocab_size(parallel.tensor) // parallel.tensor
    require(
        width * (parallel.tensor - 1) < arch.vocab_size,
        f"parallel.tensor={parallel.tensor}",
        f"with vocab_size={arch.vocab_size} and {width} entries for each rank, the last rank would have none",
    )
    _check_experts(arch, parallel)


def check_replay(arch: Architecture, replay: str) -> None:
    """Check that the model has experts, whose choice ``objective.replay`` replays. Raises ValueError otherwise."""
    rule = f"the {arch.family} model has no experts, whose choice could be replayed"
    require(replay == "off" or arch.experts is not None, f"objective.replay={replay}", rule)


def check_tensor_parallel(arch: Architecture, size: int, *, axis: str = "tensor_parallel") -> None:
    """Check that ``size`` ranks share heads, groups and a dense MLP evenly, as Megatron-Core requires.

    Args:
        axis: name of the size in errors.

    Raises:
        ValueError: e.g. ``tensor_parallel=3 does not divide num_attention_heads=28``.
    """
    require_divides(axis, size, "num_attention_heads", arch.num_attention_heads)
    require_divides(axis, size, "num_key_value_heads", arch.num_key_value_heads)
    if arch.num_dense_layers:
        require_divides(axis, size, "intermediate_size", arch.ffn_hidden_size)
    if arch.experts is not None:
        require_divides(axis, size, "n_shared_experts · moe_intermediate_size", arch.experts.shared_width)


def check_fp8_sizes(arch: Architecture, parallel: ParallelConfig, fp8: Fp8Config) -> None:
    """Check that the shards of the linear layers suit the FP8 recipe.

    Raises:
        ValueError: e.g. ``model.fp8.recipe=mxfp8: intermediate_size / parallel.tensor = 48: must be a multiple of 32``;
            or the model has multi-head latent attention, attention sinks or shared experts.
    """
    if not fp8.is_on:
        return
    _refuse_unchecked(arch, fp8)
    granule, tensor = fp8.token_multiple, parallel.tensor
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
    per_stage = arch.num_layers // parallel.pipeline  # Megatron's limit, also if stages differ
    for name in ("first_layers_bf16", "last_layers_bf16"):
        value = getattr(fp8, name)
        require(
            value <= per_stage, f"model.fp8.{name}={value}", f"must not exceed a pipeline stage's {per_stage} layers"
        )


def _refuse_unchecked(arch: Architecture, fp8: Fp8Config) -> None:
    unchecked = {
        "multi-head latent attention": arch.latent is not None,
        "attention sinks and biases of experts": arch.attention_sinks,
        "shared experts": arch.experts is not None and arch.experts.shared_width > 0,
    }
    for part, is_there in unchecked.items():
        require(
            not is_there,
            f"model.fp8.recipe={fp8.recipe}",
            f"must be none for a {arch.family} model: FP8 was not checked with {part}",
        )


def _check_experts(arch: Architecture, parallel: ParallelConfig) -> None:
    if arch.experts is None:
        for axis, size in (("parallel.expert", parallel.expert), ("parallel.expert_tensor", parallel.expert_tensor)):
            require(size == 1, f"{axis}={size}", f"a {arch.family} model has no experts")
        return
    width = arch.experts.ffn_hidden_size
    require_divides("parallel.expert", parallel.expert, "num_experts", arch.experts.num_experts)
    require(
        parallel.expert_tensor == 1 or not arch.linear_bias,
        f"parallel.expert_tensor={parallel.expert_tensor}",
        f"must be 1 for a {arch.family} model: Megatron adds the biases of experts on each rank that splits them",
    )
    require_divides("parallel.expert_tensor", parallel.expert_tensor, "moe_intermediate_size", width)
    require(
        parallel.tensor == 1 or parallel.sequence,
        f"parallel.tensor={parallel.tensor}",
        "a mixture of experts needs parallel.sequence=true with it (Megatron refuses to train otherwise)",
    )
