"""Rotary frequencies against those of transformers."""

import pytest
import torch

from megatron_dypo.architecture import architecture_from_hf
from megatron_dypo.mcore.rope import inverse_frequencies
from tests.hf_models import LLAMA3_ROPE, import_transformers

LLAMA_3_1 = {**LLAMA3_ROPE, "original_max_position_embeddings": 8192}
LLAMA_3_2 = {**LLAMA_3_1, "factor": 32.0}
UNUSUAL = {**LLAMA3_ROPE, "low_freq_factor": 2.0, "high_freq_factor": 3.0, "rope_theta": 10_000.0}


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 1e6}, LLAMA_3_1, LLAMA_3_2, UNUSUAL])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_frequencies_equal_those_of_transformers(rope, head_dim):
    transformers = import_transformers()
    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, rope_parameters=rope
    )
    expected = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq
    ours = inverse_frequencies(architecture_from_hf(config.to_dict(), where="config"))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
