"""The smallest HF config of a model type."""

from __future__ import annotations

from typing import Any

SIZES: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "intermediate_size": 96,
    "vocab_size": 131,
    "max_position_embeddings": 512,
}
"""Keys that every config.json must have."""
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
EXPERT_SIZES = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
ROUTED_SIZES = {
    "n_routed_experts": 16,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 5,
    "num_attention_heads": 128,
}
"""transformers' default is 128 key-value heads, and three dense layers."""
GLM_SIZES = {"n_routed_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
STACKED_SIZES = {"num_local_experts": 4, "num_experts_per_tok": 2}


def smallest(family: str) -> dict[str, Any]:
    """Return a config.json of this model type with required keys only."""
    more = {
        "qwen3_moe": EXPERT_SIZES,
        "deepseek_v3": ROUTED_SIZES,
        "glm4_moe": GLM_SIZES,
        "gpt_oss": STACKED_SIZES,
    }
    return {"model_type": family, **SIZES, **more.get(family, {})}
