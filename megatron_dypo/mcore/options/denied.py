"""Fields of Megatron's configs that a ``megatron`` mapping may not set, each with the reason or the key to use.

A row is a pattern of names (``fnmatch``) and a text. Names of other versions of Megatron are here too. The first row
that matches counts.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

Rows = Sequence[tuple[str, str]]

_MODEL_FILES = "config.json of model.hf_path gives it"
_NO_FAMILY = "no family of models here has it"
_INFERENCE = "it is for Megatron's own inference, and SGLang's servers sample here"
_SAME_LOGPROBS = "the same weights must give the same log-probs in every pass"
_SERVERS_DROP_NONE = "the servers drop no token, so log-probs would differ from theirs"
_OWN_PROGRAM = "it needs Megatron's own training program, which this package does not use"
_GRAPHS = "a CUDA graph has one shape, and microbatches are packed with sequences of any length"
_LAYERS = "use parallel.first_stage_layers and parallel.last_stage_layers"
_FP8 = "use the section model.fp8"
_NO_FP4 = "FP4 is not known to padding, layout checks and refit"
_RECOMPUTE = "use model.recompute and model.recompute_modules"
_DISPATCHER = "use parallel.expert_dispatcher"
_NO_REPLICA_SHARDS = "the mesh has no such groups"

MODEL: Rows = (
    ("tensor_model_parallel_size", "use parallel.tensor"),
    ("pipeline_model_parallel_size", "use parallel.pipeline"),
    ("virtual_pipeline_model_parallel_size", "use parallel.virtual_pipeline"),
    ("sequence_parallel", "use parallel.sequence"),
    ("context_parallel_size", "use parallel.context"),
    ("expert_model_parallel_size", "use parallel.expert"),
    ("expert_tensor_parallel_size", "use parallel.expert_tensor"),
    ("*tensor_parallel_num_weight_shards", _NO_REPLICA_SHARDS),
    ("*gtp_weight_remat_size", _NO_REPLICA_SHARDS),
    ("hierarchical_context_parallel_sizes", _NO_REPLICA_SHARDS),
    ("hybrid_context_parallel", _OWN_PROGRAM),
    ("max_seqlen_per_dp_cp_rank", _OWN_PROGRAM),
    ("moe_extended_tp", "use parallel.expert_tensor"),
    ("num_layers_in_first_pipeline_stage", _LAYERS),
    ("num_layers_in_last_pipeline_stage", _LAYERS),
    ("pipeline_model_parallel_layout", _LAYERS),
    ("account_for_*_in_pipeline_split", _LAYERS),
    ("overlap_p2p_comm*", "the schedule decides: batched calls give wrong gradients in an interleaved one"),
    ("batch_p2p_comm", "the schedule decides: batched calls give wrong gradients in an interleaved one"),
    ("microbatch_group_size_per_vp_stage", "microbatches come in groups of parallel.pipeline"),
    ("pipeline_model_parallel_comm_backend", "this package makes the groups of ranks, by NCCL or gloo"),
    ("variable_seq_lengths", "microbatches are packed, so their lengths differ"),
    ("params_dtype", "use model.dtype"),
    ("pipeline_dtype", "use model.dtype"),
    ("bf16", "use model.dtype"),
    ("fp16", "use model.dtype; fp16 is not offered"),
    ("enable_autocast", "use model.dtype"),
    ("autocast_dtype", "use model.dtype"),
    ("fp32_residual_connection", "pipeline stages send each other values of model.dtype"),
    ("fp8*", _FP8),
    ("first_last_layers_bf16", _FP8),
    ("num_layers_at_*_in_bf16", _FP8),
    ("tp_only_amax_red", _FP8),
    ("fp4*", _NO_FP4),
    ("quant_recipe", _NO_FP4),
    ("use_kitchen*", _NO_FP4),
    ("kitchen_*", _NO_FP4),
    ("recompute_granularity", _RECOMPUTE),
    ("recompute_method", _RECOMPUTE),
    ("recompute_num_layers", _RECOMPUTE),
    ("recompute_modules", _RECOMPUTE),
    ("moe_layer_recompute", _RECOMPUTE),
    ("num_microbatches_with_partial_activation_checkpoints", _RECOMPUTE),
    ("hidden_dropout", _SAME_LOGPROBS),
    ("attention_dropout", _SAME_LOGPROBS),
    ("moe_input_jitter_eps", _SAME_LOGPROBS),
    ("moe_router_force_*", "the router's choice would not depend on the tokens"),
    ("moe_token_dropping", _SERVERS_DROP_NONE),
    ("moe_expert_capacity_factor", _SERVERS_DROP_NONE),
    ("moe_pad_expert_input_to_capacity", _SERVERS_DROP_NONE),
    ("moe_token_drop_policy", _SERVERS_DROP_NONE),
    ("moe_expert_rank_capacity_factor", _SERVERS_DROP_NONE),
    ("moe_router_load_balancing_type", "the load-balancing loss is this package's own: use model.moe_aux_loss_coef"),
    ("moe_aux_loss_coeff", "use model.moe_aux_loss_coef"),
    (
        "moe_z_loss_coeff",
        "its gradient would be scaled by the number of tokens; use model.moe_aux_loss_coef",
    ),
    ("moe_grad_scale_func", "the losses are this package's own"),
    ("moe_router_bias_update_rate", _OWN_PROGRAM),
    ("moe_enable_routing_replay", "use objective.replay"),
    ("moe_token_dispatcher_type", _DISPATCHER),
    ("moe_flex_dispatcher_backend", _DISPATCHER),
    ("moe_enable_deepep", _DISPATCHER),
    ("moe_grouped_gemm", "the layers decide: Transformer Engine's are grouped, torch's are not"),
    ("moe_use_legacy_grouped_gemm", "checkpoints and refit do not know its weights"),
    ("moe_single_grouped_*", "checkpoints and refit do not know its weights"),
    ("use_grouped_gemm_for_*", "checkpoints and refit do not know its weights"),
    ("use_transformer_engine_op_fuser", "checkpoints and refit do not know its weights"),
    ("*glu_interleave_size", "checkpoints and refit do not know its weights"),
    ("calculate_per_token_loss", "the losses are this package's own: sums, each divided once"),
    ("cross_entropy_*", "the losses are this package's own"),
    ("mtp_*", "the losses are this package's own, and have no term for predicted tokens"),
    ("*_loss_scale_func", "the losses are this package's own"),
    ("init_method*", "weights are loaded, not drawn"),
    ("*_init_method*", "weights are loaded, not drawn"),
    ("perform_initialization", "weights are loaded, not drawn"),
    ("use_cpu_initialization", "weights are loaded, not drawn"),
    ("init_model_with_meta_device", "weights are loaded, not drawn"),
    ("use_mup", _MODEL_FILES),
    ("mup_*", _MODEL_FILES),
    ("use_te_rng_tracker", "the generators of run.seed are Megatron's own"),
    ("inference_rng_tracker", "the generators of run.seed are Megatron's own"),
    ("inference_*", _INFERENCE),
    ("use_inference_optimized_layers", _INFERENCE),
    ("flash_decode", _INFERENCE),
    ("mlp_chunks_for_prefill", _INFERENCE),
    ("nccl_all_reduce_for_prefill", _INFERENCE),
    ("symmetric_ar_type", _INFERENCE),
    ("moe_pad_experts_for_cuda_graph_inference", _INFERENCE),
    ("*cuda_graph*", _GRAPHS),
    ("tp_comm_*", _OWN_PROGRAM),
    ("overlap_moe_expert_parallel_comm", _OWN_PROGRAM),
    ("delay_wgrad_compute", _OWN_PROGRAM),
    ("overlap_dispatch_backward_with_experts_wgrad", _OWN_PROGRAM),
    ("ep_overlap_early_attn_memory_release", _OWN_PROGRAM),
    ("qk_clip*", _OWN_PROGRAM),
    ("log_max_attention_logit", _OWN_PROGRAM),
    ("defer_embedding_wgrad_compute", "the output layer's gradient is computed with the log-probs"),
    ("wgrad_deferral_limit", "the output layer's gradient is computed with the log-probs"),
    ("transformer_impl", "the layers decide: Transformer Engine's where it is installed, else torch's"),
    ("num_layers", _MODEL_FILES),
    ("hidden_size", _MODEL_FILES),
    ("num_attention_heads", _MODEL_FILES),
    ("num_query_groups", _MODEL_FILES),
    ("kv_channels", _MODEL_FILES),
    ("ffn_hidden_size", _MODEL_FILES),
    ("softmax_scale", _MODEL_FILES),
    ("softmax_type", _MODEL_FILES),
    ("normalization", _MODEL_FILES),
    ("layernorm_*", _MODEL_FILES),
    ("add_bias_linear", _MODEL_FILES),
    ("add_qkv_bias", _MODEL_FILES),
    ("gated_linear_unit", _MODEL_FILES),
    ("activation_func", _MODEL_FILES),
    ("activation_func_clamp_value", _MODEL_FILES),
    ("glu_linear_offset", _MODEL_FILES),
    ("qk_layernorm", _MODEL_FILES),
    ("qk_l2_norm", _MODEL_FILES),
    ("rotary_interleaved", _MODEL_FILES),
    ("no_rope_freq", _MODEL_FILES),
    ("mrope_section", _MODEL_FILES),
    ("window_*", _MODEL_FILES),
    ("attention_output_gate", _MODEL_FILES),
    ("apply_residual_connection_post_layernorm", _MODEL_FILES),
    ("num_moe_experts", _MODEL_FILES),
    ("moe_ffn_hidden_size", _MODEL_FILES),
    ("moe_router_topk*", _MODEL_FILES),
    ("moe_router_num_groups", _MODEL_FILES),
    ("moe_router_group_topk", _MODEL_FILES),
    ("moe_router_pre_softmax", _MODEL_FILES),
    ("moe_router_score_function", _MODEL_FILES),
    ("moe_router_enable_expert_bias", _MODEL_FILES),
    ("moe_shared_expert_intermediate_size", _MODEL_FILES),
    ("moe_shared_expert_gate", _MODEL_FILES),
    ("moe_layer_freq", _MODEL_FILES),
    ("moe_latent_size", _MODEL_FILES),
    ("moe_apply_probs_on_input", _MODEL_FILES),
    ("multi_latent_attention", _MODEL_FILES),
    ("experimental_attention_variant", _NO_FAMILY),
    ("dsa_*", _NO_FAMILY),
    ("linear_*", _NO_FAMILY),
    ("mamba_*", _NO_FAMILY),
    ("use_mamba_mem_eff_path", _NO_FAMILY),
    ("is_hybrid_model", _NO_FAMILY),
    ("heterogeneous_block_specs", _NO_FAMILY),
    ("hetereogenous_dist_checkpoint", _NO_FAMILY),
)
"""Rows for ``model.megatron`` (``TransformerConfig``)."""

_PRECISION_AWARE = "use optimizer.precision_aware"
_OFFLOAD = "use optimizer.cpu_offload"

OPTIMIZER: Rows = (
    ("optimizer", "use optimizer.algorithm"),
    ("lr", "use optimizer.lr"),
    ("min_lr", "use optimizer.min_lr"),
    ("decoupled_lr", "one schedule, that of optimizer.lr, drives all parameters"),
    ("decoupled_min_lr", "one schedule, that of optimizer.lr, drives all parameters"),
    ("weight_decay", "use optimizer.weight_decay"),
    ("adam_beta1", "use optimizer.beta1"),
    ("adam_beta2", "use optimizer.beta2"),
    ("adam_eps", "use optimizer.eps"),
    ("clip_grad", "use optimizer.clip_grad"),
    ("grad_norm_skip_threshold", "optimizer.on_bad_step decides which updates are skipped"),
    ("params_dtype", "use model.dtype"),
    ("bf16", "use model.dtype"),
    ("fp16", "use model.dtype; fp16 is not offered"),
    ("*loss_scale*", "fp16 alone scales its loss, and is not offered"),
    ("hysteresis", "fp16 alone scales its loss, and is not offered"),
    ("fp8_recipe", _FP8),
    ("reuse_grad_buf_for_mxfp8_param_ag", _FP8),
    ("main_params_dtype", "main parameters are fp32: π_ref, checkpoints and weights are made from them"),
    ("use_distributed_optimizer", "use optimizer.distributed"),
    ("use_layer_wise_distributed_optimizer", "use optimizer.algorithm"),
    ("use_precision_aware_optimizer", _PRECISION_AWARE),
    ("optimizer_cpu_offload", _OFFLOAD),
    ("optimizer_offload_fraction", _OFFLOAD),
    ("overlap_param_gather", "use optimizer.overlap_param_gather"),
    ("overlap_param_gather_with_optimizer_step", _OWN_PROGRAM),
    ("optimizer_cuda_graph", "updates whose gradients are not finite are skipped, which a CUDA graph cannot do"),
    ("sgd_*", "optimizer.algorithm offers no SGD"),
    ("lion_*", "optimizer.algorithm offers no Lion"),
    ("soap_*", "optimizer.algorithm offers no SOAP"),
    ("adaptive_muon_*", "optimizer.algorithm offers no adaptive Muon"),
)
"""Rows for ``optimizer.megatron`` (``OptimizerConfig``)."""

_NO_FSDP = "the model is wrapped by DistributedDataParallel, not by Megatron's FSDP"

PARALLEL: Rows = (
    ("overlap_grad_reduce", "use optimizer.overlap_grad_reduce"),
    ("overlap_param_gather", "use optimizer.overlap_param_gather"),
    ("align_param_gather", "use optimizer.overlap_param_gather"),
    ("use_distributed_optimizer", "use optimizer.distributed"),
    ("average_in_collective", "gradients are summed: each term of the loss is divided once, by its global count"),
    ("check_for_nan_in_grad", "optimizer.on_bad_step decides about gradients that are not finite"),
    ("check_for_large_grads", "optimizer.on_bad_step decides about bad gradients"),
    ("fp8_param_gather", _FP8),
    ("reuse_grad_buf_for_mxfp8_param_ag", _FP8),
    ("fp4_param_gather", _NO_FP4),
    ("num_distributed_optimizer_instances", _NO_REPLICA_SHARDS),
    ("use_megatron_fsdp", _NO_FSDP),
    ("use_custom_fsdp", _NO_FSDP),
    ("*fsdp*", _NO_FSDP),
    ("*_sharding_strategy", _NO_FSDP),
    ("gradient_reduce_div_fusion", _NO_FSDP),
    ("suggested_communication_unit_size", _NO_FSDP),
    ("preserve_fp32_weights", _NO_FSDP),
    ("keep_fp8_transpose_cache", _NO_FSDP),
    ("delay_wgrad_compute", _OWN_PROGRAM),
)
"""Rows for ``parallel.megatron`` (``DistributedDataParallelConfig``)."""


def reason_against(name: str, rows: Rows) -> str | None:
    """Return why ``name`` may not be set; None: it may."""
    return next((reason for pattern, reason in rows if fnmatch.fnmatchcase(name, pattern)), None)
