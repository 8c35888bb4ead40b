"""Models of the type of DeepSeek-V3: what is read, what is refused, what it costs."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_dypo.config.fp8 import Fp8Config
from megatron_dypo.config.model import ParallelConfig
from megatron_dypo.models.architecture import Architecture, architecture_from_hf
from megatron_dypo.models.flops import sequence_cost
from megatron_dypo.models.layout_rules import check_fp8_sizes, check_layout
from megatron_dypo.planning.parameters import active_parameters, served_bytes, whole_model

MOONLIGHT: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 163840,
    "max_position_embeddings": 8192,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.446,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "num_nextn_predict_layers": 0,
}
"""Sizes of Moonlight-16B-A3B, as published."""
DEEPSEEK: dict[str, Any] = {
    **MOONLIGHT,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "vocab_size": 129280,
    "q_lora_rank": 1536,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
}
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}


def read(raw: dict[str, Any], **changes: Any) -> Architecture:
    return architecture_from_hf({**raw, **changes}, where="config.json")


@pytest.mark.parametrize(("raw", "billions", "active"), [(MOONLIGHT, 15.96, 2.24), (DEEPSEEK, 671.0, 36.6)])
def test_parameters_are_the_published_ones(raw, billions, active):
    """16B-A3B (2.24B activated without embeddings) and 671B-A37B, without layers that predict further tokens."""
    arch = read(raw)
    assert whole_model(arch).total / 1e9 == pytest.approx(billions, rel=0.002)
    embeddings = 0 if raw is MOONLIGHT else arch.vocab_size * arch.hidden_size
    assert (active_parameters(arch) + embeddings) / 1e9 == pytest.approx(active, rel=0.01)
    assert served_bytes(arch, 2, "none").total == 2 * whole_model(arch).total


@pytest.mark.parametrize("raw", [MOONLIGHT, DEEPSEEK])
def test_linear_flops_are_two_for_each_weight_that_a_token_meets(raw):
    arch = read(raw)
    norms = 2 * arch.hidden_size + sum(filter(None, (raw["q_lora_rank"], raw["kv_lora_rank"])))
    experts = raw["n_routed_experts"] * (arch.num_layers - raw["first_k_dense_replace"])
    counted = active_parameters(arch) - norms * arch.num_layers - experts  # the biases
    assert sequence_cost(arch).linear / 6 == pytest.approx(counted, rel=1e-9)
    assert sequence_cost(arch).quadratic == 6 * arch.num_layers * arch.num_attention_heads * (192 + 128) / 2


def test_a_token_of_the_cache_is_one_latent_vector_on_every_rank():
    assert {read(DEEPSEEK).cached_channels(size) for size in (1, 8, 16)} == {512 + 64}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob=False: only true is supported"),
        ({"rope_interleave": False}, "rope_interleave=False: only true is supported"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax': only 'sigmoid' is supported"),
        ({"topk_method": "greedy"}, "topk_method='greedy': only 'noaux_tc' is supported"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2: only 1 is supported"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok=1: must be from 2 to n_routed_experts=256"),
        ({"num_experts_per_tok": 6}, "num_experts_per_tok=6: must be 2 × topk_group=4: Megatron ranks a group"),
        ({"n_group": 7}, "n_group=7: must divide n_routed_experts=256"),
        ({"topk_group": 9}, "topk_group=9: must not exceed n_group=8"),
        ({"first_k_dense_replace": 61}, "first_k_dense_replace=61: must be below num_hidden_layers=61"),
        ({"num_key_value_heads": 64}, "num_key_value_heads=64: must be num_attention_heads=128"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim=63: must be even"),
        ({"rope_scaling": {**YARN, "mscale": 0.7}}, "attention_factor=.* must be 1 with multi-head latent attention"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear': only 'default' and 'yarn' are"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=f"^config.json: {message}"):
        read(DEEPSEEK, **changes)


def test_layouts_and_fp8_that_do_not_suit_are_refused():
    arch = read(MOONLIGHT)
    check_layout(arch, ParallelConfig(tensor=2, sequence=True, expert=2))
    with pytest.raises(ValueError, match=r"parallel.tensor=2: a mixture of experts needs parallel.sequence=true"):
        check_layout(arch, ParallelConfig(tensor=2))
    with pytest.raises(ValueError, match=r"^model.fp8.recipe=blockwise: must be none for a deepseek_v3 model"):
        check_fp8_sizes(arch, ParallelConfig(), Fp8Config(recipe="blockwise"))
