"""Rotary frequencies and the scale of scores against those of transformers, and against the papers in float64."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dypo.mcore.compat.rotated_scale import FACTOR_OF_CONFIG, scale_rotated
from megatron_dypo.mcore.rope import inverse_frequencies, softmax_scale
from megatron_dypo.models.architecture import architecture_from_hf
from tests.support.hf_models import LLAMA3_ROPE, import_transformers

LLAMA_3_1 = {**LLAMA3_ROPE, "original_max_position_embeddings": 8192}
LLAMA_3_2 = {**LLAMA_3_1, "factor": 32.0}
UNUSUAL = {**LLAMA3_ROPE, "low_freq_factor": 2.0, "high_freq_factor": 3.0, "rope_theta": 10_000.0}


def config_of(rope, head_dim):
    return import_transformers().LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, rope_parameters=dict(rope)
    )


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 1e6}, LLAMA_3_1, LLAMA_3_2, UNUSUAL])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_frequencies_equal_those_of_transformers(rope, head_dim):
    config = config_of(rope, head_dim)
    expected = import_transformers().models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq
    ours = inverse_frequencies(architecture_from_hf(config.to_dict(), where="config"))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


QWEN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
SCALED: dict[str, dict[str, Any]] = {
    "qwen": QWEN,
    "linear": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0},
    "fractional factor": {**QWEN, "factor": 2.5, "rope_theta": 10_000.0},
    "betas": {**QWEN, "beta_fast": 16, "beta_slow": 2},
    "betas that are null": {**QWEN, "beta_fast": None, "beta_slow": None},
    "betas that meet": {**QWEN, "beta_fast": 4, "beta_slow": 4, "truncate": False},
    "attention factor": {**QWEN, "attention_factor": 0.8},
    "mscales": {**QWEN, "mscale": 0.707, "mscale_all_dim": 1.0},
    "mscale alone": {**QWEN, "mscale": 2.0},
    "mscale of zero": {**QWEN, "mscale": 0.0, "mscale_all_dim": 1.0},
    "bounds that are not whole": {**QWEN, "truncate": False},
    "factor of one": {**QWEN, "factor": 1.0},
    "few original positions": {**QWEN, "original_max_position_embeddings": 64, "rope_theta": 10_000.0},
    "factor from positions": {**QWEN, "factor": None, "original_max_position_embeddings": 1024},
}


@pytest.mark.parametrize("head_dim", [24, 64, 128])
@pytest.mark.parametrize("name", SCALED)
def test_scaled_frequencies_and_attention_factor_are_those_of_transformers_to_the_last_bit(name, head_dim):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = config_of(SCALED[name], head_dim)
    expected, attention_factor = ROPE_INIT_FUNCTIONS[SCALED[name]["rope_type"]](config)
    arch = architecture_from_hf(config.to_dict(), where="config")
    assert torch.equal(inverse_frequencies(arch), expected)
    scale = softmax_scale(arch)
    assert (scale or 1 / math.sqrt(head_dim)) == pytest.approx(attention_factor**2 / math.sqrt(head_dim), rel=1e-12)


def yarn_frequencies(rope, head_dim):
    """Compute the frequencies of section 3.2 of arXiv 2309.00071, pair by pair."""
    theta, factor, original = rope["rope_theta"], rope["factor"], rope["original_max_position_embeddings"]

    def pair_that_turns(times):
        # theta^(−2i/d) · original = 2π · times, solved for i
        return head_dim / 2 * math.log(original / (2 * math.pi * times), theta)

    first, last = pair_that_turns(rope.get("beta_fast", 32)), pair_that_turns(rope.get("beta_slow", 1))
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    frequencies = []
    for pair in range(head_dim // 2):
        frequency = theta ** (-2 * pair / head_dim)
        slowed_part = min(max((pair - first) / (last - first), 0.0), 1.0)
        frequencies.append((1 - slowed_part) * frequency + slowed_part * frequency / factor)
    return np.array(frequencies)


@pytest.mark.parametrize("name", ["qwen", "fractional factor", "betas", "bounds that are not whole"])
def test_yarn_is_that_of_the_paper_in_float64(name):
    arch = architecture_from_hf(config_of(SCALED[name], 128).to_dict(), where="config")
    ours = inverse_frequencies(arch, torch.float64).numpy()
    np.testing.assert_allclose(ours, yarn_frequencies(SCALED[name], 128), rtol=1e-12)
    assert softmax_scale(arch) == pytest.approx((0.1 * math.log(SCALED[name]["factor"]) + 1) ** 2 / math.sqrt(128))


def test_scores_have_the_usual_scale_without_yarn():
    for rope in ({"rope_type": "default", "rope_theta": 1e6}, LLAMA_3_1, SCALED["linear"]):
        assert softmax_scale(architecture_from_hf(config_of(rope, 64).to_dict(), where="config")) is None


@pytest.mark.parametrize("factor", [1.0, 1.2079441541679836, 0.8])
def test_megatron_reads_the_factor_of_rotated_channels_from_its_config(factor):
    config: Any = SimpleNamespace(apply_rope_fusion=False)
    scale_rotated(config, factor)
    assert FACTOR_OF_CONFIG.get()(config) == pytest.approx(factor, rel=1e-12)
    assert (len(vars(config)) == 1) == (factor == 1)


def test_a_fused_rotation_that_would_ignore_the_factor_is_refused():
    config: Any = SimpleNamespace(apply_rope_fusion=True)
    scale_rotated(config, 1.0)
    with pytest.raises(ValueError, match=r"^model.megatron.apply_rope_fusion=True: must be false: .* factor 1.2 of"):
        scale_rotated(config, 1.2)
