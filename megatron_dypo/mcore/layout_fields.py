"""The fields of Megatron's configuration that the run decides, not the model: layout, precision, memory, fusions."""

from __future__ import annotations

from typing import Any

import torch

from megatron_dypo.config.model import ModelConfig, ParallelConfig
from megatron_dypo.mcore.features import Features
from megatron_dypo.mcore.options.named import dispatcher, recompute
from megatron_dypo.mcore.rope import rotated_scale
from megatron_dypo.models.architecture import Architecture
from megatron_dypo.parallel import device


def layout_fields(
    arch: Architecture, model: ModelConfig, parallel: ParallelConfig, features: Features
) -> dict[str, Any]:
    """Return the fields of ``TransformerConfig`` for layout, precision, memory and fusions."""
    dtype = getattr(torch, model.dtype)  # the config's names are torch's
    interleaved = parallel.virtual_pipeline is not None
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline,
        **_cut(parallel),
        "context_parallel_size": parallel.context,
        "sequence_parallel": parallel.sequence,
        "calculate_per_token_loss": True,
        "variable_seq_lengths": parallel.pipeline > 1,
        **dispatcher(parallel),
        # Interleaving with batched p2p gives wrong gradients without an error; 1F1B knows no overlap.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        "bias_activation_fusion": device.on_gpu(),
        "bias_dropout_fusion": device.on_gpu() and not arch.linear_bias,  # grouped experts with biases refuse it
        "masked_softmax_fusion": False,
        # The fused rotation of latent attention computes Megatron's own yarn frequencies, in the model's type; that of
        # other heads knows no factor.
        "apply_rope_fusion": features.transformer_engine and arch.latent is None and rotated_scale(arch) == 1,
        "gradient_accumulation_fusion": features.grad_accumulation_fusion,
        "attention_softmax_in_fp32": True,
        **recompute(model),
    }


def _cut(parallel: ParallelConfig) -> dict[str, int | None]:
    # With two stages, the size of the last follows from that of the first. If both are given, an interleaved schedule
    # in Megatron divides by the number of stages between them, zero (get_transformer_layer_offset,
    # transformer/transformer_layer.py:138 of 0.16.1).
    implied = parallel.pipeline == 2 and parallel.first_stage_layers is not None
    return {
        "num_layers_in_first_pipeline_stage": parallel.first_stage_layers,
        "num_layers_in_last_pipeline_stage": None if implied else parallel.last_stage_layers,
    }
