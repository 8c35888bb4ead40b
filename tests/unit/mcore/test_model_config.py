"""What the model refuses, and what it tells Megatron."""

import pytest

from megatron_dypo.architecture import Architecture
from megatron_dypo.config import ModelConfig, ParallelConfig
from megatron_dypo.mcore.features import Features
from megatron_dypo.mcore.model import transformer_config

ARCH = Architecture(
    family="qwen2",
    num_layers=12,
    hidden_size=56,
    num_attention_heads=28,
    num_key_value_heads=4,
    head_dim=8,
    ffn_hidden_size=96,
    vocab_size=131,
    max_position_embeddings=512,
    norm_epsilon=1e-6,
    rope_theta=1e6,
    rope_scaling=None,
    tied_embeddings=False,
    qkv_bias=True,
    qk_norm=False,
)


@pytest.mark.parametrize("virtual_pipeline", [None, 2, 3])
def test_interleaving_never_meets_batched_p2p(virtual_pipeline):
    parallel = ParallelConfig(pipeline=2, virtual_pipeline=virtual_pipeline)
    features = Features(transformer_engine=False, grad_accumulation_fusion=False)
    config = transformer_config(ARCH, ModelConfig(hf_path="x"), parallel, features)
    assert config.batch_p2p_comm == (virtual_pipeline is None)
    assert config.overlap_p2p_comm == (virtual_pipeline is not None)
