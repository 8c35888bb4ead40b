"""The policy: Megatron's GPTModel for an HF architecture, one wrapped chunk for each virtual pipeline stage.

Order of building: :func:`build_model`, :func:`load_initial_weights`, then the optimizer, which copies the parameters
into its fp32 main parameters.

Forward of a chunk on one packed microbatch of T tokens::

    output = chunk(tokens_1T, positions_1T, None, packed_seq_params=packed_seq_params(cu_seqlens_S))

On the last stage ``output`` is the fp32 logits [1, T, V/tp], this rank's slice of the padded vocabulary. With labels it
is the log-probs of response tokens (:class:`~megatron_dypo.mcore.policy_model.PolicyModel`). On other stages it is the
hidden states [T, 1, hidden] ([T/tp, 1, hidden] with sequence parallelism, for which tp must divide T). Microbatches may
differ in T. An interleaved schedule needs a number of microbatches that ``pipeline`` divides.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    finalize_model_grads,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_dypo.config.model import ModelConfig, ParallelConfig
from megatron_dypo.mcore import fp8
from megatron_dypo.mcore.bridged.build import build_bridged_chunk
from megatron_dypo.mcore.bridged.provider import read_provider, set_fields
from megatron_dypo.mcore.bridged.weights import BridgedWeights
from megatron_dypo.mcore.checkpoints.weights import load_weights
from megatron_dypo.mcore.compat.expert_biases import copy_expert_outputs
from megatron_dypo.mcore.compat.rotated_scale import scale_rotated
from megatron_dypo.mcore.features import Features, probe, require_fp8
from megatron_dypo.mcore.layer_specs import chunk_spec
from megatron_dypo.mcore.layout_fields import layout_fields
from megatron_dypo.mcore.moe_router import keep_bias_in_fp32, mark_experts, moe_settings
from megatron_dypo.mcore.options.denied import MODEL
from megatron_dypo.mcore.options.named import data_parallel_config, named
from megatron_dypo.mcore.options.reading import Mapped, make, read_options, refusals
from megatron_dypo.mcore.param_gather import finish_one, keep_whole
from megatron_dypo.mcore.policy_model import PolicyModel
from megatron_dypo.mcore.rope import inverse_frequencies, rotated_scale
from megatron_dypo.mcore.sizes import NO_INITIAL_VALUES, sizes
from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.hf.read import HFReader
from megatron_dypo.models.layout_rules import check_fp8_sizes, check_layout
from megatron_dypo.models.load import load_hf_weights
from megatron_dypo.models.random_model import fill_random
from megatron_dypo.parallel import device
from megatron_dypo.parallel.groups import MeshRank


def build_model(
    arch: Architecture,
    model: ModelConfig,
    parallel: ParallelConfig,
    layout: MeshRank,
    *,
    distributed_optimizer: bool = False,
    overlap_grad_reduce: bool = False,
    overlap_param_gather: bool = False,
) -> list[DistributedDataParallel]:
    """Build the chunks of this pipeline rank, in the order of their virtual stages. Parameters are uninitialised
    memory.

    Gradients are *summed* over microbatches and data-parallel ranks, never divided. The loss function returns ``(loss,
    num_tokens, metrics)`` with a loss that is already normalised over the global batch. ``num_tokens``, an int tensor,
    is ignored; with a 2-tuple Megatron would divide by the number of microbatches.

    Raises:
        ValueError: the layout does not suit the architecture, or an FP8 recipe or an option of Megatron does not suit
            it or the machine.
    """
    check_layout(arch, parallel)
    check_fp8_sizes(arch, parallel, model.fp8)
    features = probe()
    require_fp8(model.fp8, features)
    config, layers = transformer_config(arch, model, parallel, features), layout.mesh.chunks(arch.num_layers)
    ddp_config = data_parallel_config(
        model,
        parallel,
        overlap_grad_reduce=overlap_grad_reduce,
        overlap_param_gather=overlap_param_gather,
        align_param_gather=overlap_param_gather,  # a hook then begins no gather of its own
        use_distributed_optimizer=distributed_optimizer,
    )
    chunks = []
    for stage in range(layout.virtual_pipeline):
        module = _build_chunk(arch, model, config, features, layout, stage)
        held = [layer.layer_number - 1 for layer in module.decoder.layers]
        assert held == list(layers[layout.pp_rank][stage]), "Megatron lays the layers out in another way"
        wrapped = Float16Module(config, module) if config.bf16 else module
        keep_bias_in_fp32(module)
        # Only the first chunk's gradients can be reduced while others still compute, so only it needs buckets.
        chunks.append(DistributedDataParallel(config, ddp_config, wrapped, disable_bucketing=stage > 0))
        if overlap_param_gather:
            module.before_output = functools.partial(finish_one, chunks[-1])
    config.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    config.finalize_model_grads_func = _finalize
    return chunks


def transformer_config(
    arch: Architecture, model: ModelConfig, parallel: ParallelConfig, features: Features
) -> TransformerConfig:
    """Return Megatron's configuration of the architecture under these axes.

    Raises:
        ValueError: ``model.megatron`` names a field that is denied, unknown or of another type, or Megatron refuses the
            values.
    """
    mapped = Mapped("model.megatron", model.megatron, MODEL)
    if arch.is_bridged:
        provider = read_provider(model.hf_path, arch)
        given = read_options(TransformerConfig, mapped)
        own = {**layout_fields(arch, model, parallel, features), **NO_INITIAL_VALUES}
        set_fields(provider, own, given)
        with refusals(mapped, named(model, parallel)):
            provider.finalize()
        return provider
    config = make(
        MLATransformerConfig if arch.latent else TransformerConfig,
        mapped,
        named(model, parallel),
        **sizes(arch),
        **layout_fields(arch, model, parallel, features),
        **_experts(arch, model, parallel, features),
        **fp8.layer_settings(model.fp8),
    )
    scale_rotated(config, rotated_scale(arch))
    return config


def load_initial_weights(
    chunks: Sequence[torch.nn.Module], model: ModelConfig, arch: Architecture, layout: MeshRank
) -> None:
    """Fill the parameters from ``model.mcore_path`` if set, else from the safetensors of ``model.hf_path``.

    Raises:
        ValueError: a tensor is missing, unknown or of the wrong shape.
    """
    if arch.is_bridged and model.mcore_path is None:
        BridgedWeights(model.hf_path, chunks, layout).load()
    elif model.mcore_path is not None:
        load_weights(model.mcore_path, chunks)
        fp8.adopt_initial_values(chunks)
    else:
        reader = HFReader(model.hf_path)
        load_hf_weights(fp8.named_initial_values(chunks), reader, arch, layout)
        fp8.quantize_initial_values(chunks)


def draw_initial_weights(chunks: Sequence[torch.nn.Module], arch: Architecture, layout: MeshRank, *, seed: int) -> None:
    """Fill the parameters with random values, the same on ranks that hold the same parameters."""
    fill_random(fp8.named_initial_values(chunks), arch, layout, seed)
    fp8.quantize_initial_values(chunks)


def _build_chunk(
    arch: Architecture, model: ModelConfig, config: TransformerConfig, features: Features, layout: MeshRank, stage: int
) -> PolicyModel:
    memory_mb = model.logprob_memory_mib
    logprob_memory = None if memory_mb is None else round(memory_mb * 2**20)
    pre_process = layout.is_first_stage and stage == 0
    post_process = layout.is_last_stage and stage == layout.virtual_pipeline - 1
    vp_stage = stage if layout.virtual_pipeline > 1 else None
    if arch.is_bridged:
        bridged: PolicyModel = build_bridged_chunk(
            config,
            has_te=features.transformer_engine,
            num_tokens=arch.vocab_size,
            logprob_memory=logprob_memory,
            pre_process=pre_process,
            post_process=post_process,
            stage=vp_stage,
        ).to(device.device())
        return bridged
    chunk: PolicyModel = PolicyModel(
        config,
        chunk_spec(arch, features, layout.mesh.chunks(arch.num_layers)[layout.pp_rank][stage]),
        vocab_size=arch.padded_vocab_size(layout.tensor),
        num_tokens=arch.vocab_size,
        logprob_memory=logprob_memory,
        max_sequence_length=arch.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=arch.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=arch.rope_theta,
        parallel_output=True,
        vp_stage=vp_stage,
    ).to(device.device())
    mark_experts(chunk)
    copy_expert_outputs(chunk)
    frequencies = inverse_frequencies(arch).to(device.device())
    for rotary in [layer.self_attention for layer in chunk.decoder.layers] if arch.latent else [chunk]:
        rotary.rotary_pos_emb.inv_freq = frequencies
    return chunk


def _experts(arch: Architecture, model: ModelConfig, parallel: ParallelConfig, features: Features) -> dict[str, Any]:
    if arch.experts is None:
        return {}
    pattern = {"moe_layer_freq": [int(arch.has_experts(layer)) for layer in range(arch.num_layers)]}
    coefficient = arch.experts.moe_aux_loss_coef if model.moe_aux_loss_coef is None else model.moe_aux_loss_coef
    settings = moe_settings(
        arch.experts,
        grouped=features.transformer_engine,
        parallel=parallel,
        moe_aux_loss_coef=coefficient,
    )
    return {**settings, **(pattern if arch.has_both_kinds else {})}


def _finalize(chunks: Any, num_tokens: Any, **groups: Any) -> None:
    """Reduce gradients over all axes without dividing by ``num_tokens``, since the loss is already normalised."""
    finalize_model_grads(chunks, None, **groups)
    keep_whole(chunks)
