"""Make tiny random HF models with transformers, with a tokenizer and a generation config."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import torch

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama2": ("LlamaConfig", {"num_key_value_heads": 8}),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama3_rope": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("MistralConfig", {"head_dim": 24, "sliding_window": 128}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 24}),
}
"""Name → transformers' config class, and values that differ from the sizes below."""

_EXPERTS = {"head_dim": 24, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}

DEEPSEEK_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

_LATENT = {
    "num_key_value_heads": 8,
    "n_routed_experts": 8,
    "moe_intermediate_size": 40,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 16,
    "num_nextn_predict_layers": 0,
    "routed_scaling_factor": 2.446,
    # Fields of published files that transformers' class does not know, and SGLang reads.
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
MOONLIGHT = {**_LATENT, "q_lora_rank": None, "n_shared_experts": 2, "n_group": 1, "topk_group": 1}
DEEPSEEK = {
    **_LATENT,
    "q_lora_rank": 24,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "rope_parameters": DEEPSEEK_YARN,
}

_GLM = {
    "head_dim": 24,
    "attention_bias": True,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "first_k_dense_replace": 1,
    "partial_rotary_factor": 0.5,
    "num_nextn_predict_layers": 0,
    "routed_scaling_factor": 2.5,
}
GLM = {**_GLM, "use_qk_norm": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
GLM_YARN = {
    **_GLM,
    "use_qk_norm": False,
    "attention_bias": False,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16},
}
"""What released models have not: no biases, groups of experts, and a scaling whose factor is for rotated channels only.
"""
GPT_OSS_YARN = {
    "rope_type": "yarn",
    "rope_theta": 150_000.0,
    "factor": 32.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}
GPT_OSS = {
    "head_dim": 24,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 96,
    "sliding_window": 8,
    "swiglu_limit": 0.5,  # bounds some channels of a small model; 7 as published would bound none
    "rope_parameters": GPT_OSS_YARN,
}

MOE_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeConfig", {**_EXPERTS, "norm_topk_prob": True}),
    "qwen3_moe_raw_weights": ("Qwen3MoeConfig", {**_EXPERTS, "norm_topk_prob": False}),
    "moonlight": ("DeepseekV3Config", {**MOONLIGHT, "num_experts_per_tok": 3}),
    "deepseek_v3": ("DeepseekV3Config", DEEPSEEK),
    "glm4_moe": ("Glm4MoeConfig", GLM),
    "glm4_air": ("Glm4MoeConfig", {**GLM, "use_qk_norm": False}),
    "glm4_moe_yarn": ("Glm4MoeConfig", GLM_YARN),
    "gpt_oss": ("GptOssConfig", GPT_OSS),
}
"""Kinds with experts, which refuse some layouts that dense models accept."""

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 131,  # prime: every tensor-parallel size above 1 has to pad
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@functools.cache
def import_transformers() -> Any:
    """Import transformers so that its model classes load even if this torch cannot load torchvision."""
    if torch.version.cuda is None:
        sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]
    import transformers

    return transformers


def make_hf_model(kind: str, path: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: Any) -> Path:
    """Save a random model of a kind above under ``path`` and return ``path``; ``sizes`` override ``SIZES``."""
    transformers = import_transformers()
    config_class, extra = {**KINDS, **MOE_KINDS}[kind]
    config = getattr(transformers, config_class)(**{**SIZES, **extra, **sizes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.05)
            elif parameter.dim() > 1:
                parameter.normal_(0, 0.08)
            elif name.endswith("sinks"):
                parameter.normal_(0, 1)
            else:
                parameter.normal_(1, 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # as published, in fp32 beside weights in bf16
                owner = model.get_submodule(name.rpartition(".")[0])
                owner.e_score_correction_bias = torch.empty_like(buffer, dtype=torch.float32).normal_(0, 0.05)
    model.generation_config = transformers.GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(path)
    save_tokenizer(path, config.vocab_size)
    return path


def save_tokenizer(path: Path, vocab_size: int) -> None:
    """Write a word-level tokenizer: ``<pad>``, ``<s>``, ``</s>``, then ``t3``, ``t4``, …"""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", *(f"t{i}" for i in range(3, vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    ).save_pretrained(path)
