"""Tiny random models that have no name table here, and that Megatron-Bridge and transformers both know."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.hf_models import import_transformers

NEEDS_BRIDGE = pytest.mark.skipif(
    importlib.util.find_spec("megatron.bridge") is None,
    reason="megatron-bridge is not installed (make setup-megatron-bridge)",
)
SIZES: dict[str, Any] = {
    "vocab_size": 132,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    # LayerNorm with a bias, weights minus one, squared ReLU without a gate, half of the channels rotated
    "nemotron": (
        "NemotronConfig",
        {
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0, "partial_rotary_factor": 0.5},
        },
    ),
    # tied and scaled embeddings, RMSNorm with weights minus one, a gate with GELU
    "gemma": ("GemmaConfig", {"head_dim": 16, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}),
}


def make_bridged_model(kind: str, path: Path, **sizes: Any) -> Path:
    """Save a random model under ``path`` and return ``path``; ``sizes`` override ``SIZES``."""
    transformers = import_transformers()
    config_class, extra = KINDS[kind]
    torch.manual_seed(1)
    config = getattr(transformers, config_class)(**{**SIZES, **extra, **sizes})
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    model.save_pretrained(path)
    return path
