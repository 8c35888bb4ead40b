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

MOE_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeConfig", {**_EXPERTS, "norm_topk_prob": True}),
    "qwen3_moe_raw_weights": ("Qwen3MoeConfig", {**_EXPERTS, "norm_topk_prob": False}),
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
            if parameter.dim() > 1:
                parameter.normal_(0, 0.08)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.05)
            else:
                parameter.normal_(1, 0.1)
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
