"""The chunks of a model whose configuration is Megatron-Bridge's, with this package's loss."""

from __future__ import annotations

import functools
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear

from megatron_dypo.checks import require
from megatron_dypo.mcore.compat.bridged_model import provide
from megatron_dypo.mcore.policy_model import PolicyModel


def build_bridged_chunk(
    provider: Any,
    *,
    has_te: bool,
    num_tokens: int,
    logprob_memory: int | None,
    pre_process: bool,
    post_process: bool,
    stage: int | None,
) -> PolicyModel:
    """Let the provider build its model, of :class:`PolicyModel` in place of GPTModel.

    The provider's own steps after that, such as the scaling of embeddings, are kept.

    Args:
        has_te: keep the provider's layers, which are Transformer Engine's; else take Megatron's local ones.
        stage: virtual pipeline stage; None: there is one.

    Raises:
        ValueError: the provider builds an output layer of its own, of which the loss would use only the weight.
    """
    if not has_te:
        provider.transformer_layer_spec = local_layer
    policy = functools.partial(PolicyModel, num_tokens=num_tokens, logprob_memory=logprob_memory)
    model = provide(provider, policy, pre_process=pre_process, post_process=post_process, vp_stage=stage)
    assert isinstance(model, PolicyModel), "Megatron-Bridge builds its model of another class"
    if post_process:
        layer = type(model.output_layer)
        require(
            layer is ColumnParallelLinear,
            f"model.family=bridge: {type(provider).__name__} has an output layer of its own ({layer.__name__})",
            "must be Megatron's ColumnParallelLinear, as the loss uses only the weight of this layer",
        )
    return model


def local_layer(config: Any) -> Any:
    """Return Megatron's local transformer layer with packed attention, for a provider without experts."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_dypo.mcore.core_attention import PackedAttention

    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    spec.submodules.self_attention.submodules.core_attention = PackedAttention
    return spec
