"""What is read from an HF config, and what is refused."""

import pytest

from megatron_dypo.architecture import Experts, architecture_from_hf

QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 24,
    "intermediate_size": 96,
    "moe_intermediate_size": 40,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.01,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 131,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_experts_are_read_under_the_names_of_transformers_4_and_5(name):
    arch = architecture_from_hf({**QWEN3_MOE, name: 4}, where="config.json")
    assert arch.experts == Experts(num_experts=4, per_token=2, ffn_hidden_size=40, normalized=True, balance_coef=0.01)
    assert arch.qk_norm
    assert not arch.qkv_bias


def test_a_dense_model_has_no_experts():
    arch = architecture_from_hf({**QWEN3_MOE, "model_type": "qwen3"}, where="config.json")
    assert arch.experts is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": None}, "num_experts=None: must be a positive integer"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5: must not exceed num_experts=4"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step=2: only 1 is supported"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]: every layer must have experts"),
        ({"num_experts_per_tok": 1}, "norm_topk_prob=true with num_experts_per_tok=1"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size=0"),
    ],
)
def test_what_is_not_supported_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"^config.json: {message}"):
        architecture_from_hf({**QWEN3_MOE, "num_experts": 4, **changes}, where="config.json")


MISTRAL = {
    "model_type": "mistral",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 24,
    "intermediate_size": 96,
    "vocab_size": 131,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize("window", [None, 128])
def test_mistrals_window_and_head_size_are_read(window):
    arch = architecture_from_hf({**MISTRAL, "sliding_window": window}, where="config.json")
    assert (arch.sliding_window, arch.head_dim) == (window, 24)
    assert architecture_from_hf({**MISTRAL, "head_dim": None}, where="config.json").head_dim == 8
    arch.check_length(128, "tokens")
    with pytest.raises(ValueError, match=r"^config.json: sliding_window=0: must be a positive integer"):
        architecture_from_hf({**MISTRAL, "sliding_window": 0}, where="config.json")


def test_sequences_beyond_the_window_are_refused():
    arch = architecture_from_hf({**MISTRAL, "sliding_window": 128}, where="config.json")
    with pytest.raises(
        ValueError, match=r"^prompt \+ response = 129: must not exceed sliding_window=128 of the mistral"
    ):
        arch.check_length(129, "prompt + response")


def test_a_window_that_is_not_used_is_passed_over():
    raw = {**MISTRAL, "model_type": "qwen2", "sliding_window": 128, "use_sliding_window": False}
    assert architecture_from_hf(raw, where="config.json").sliding_window is None


def test_llama_2_has_a_key_head_for_each_query_head():
    raw = {name: value for name, value in MISTRAL.items() if name not in ("num_key_value_heads", "head_dim")}
    arch = architecture_from_hf({**raw, "model_type": "llama"}, where="config.json")
    assert (arch.num_key_value_heads, arch.head_dim, arch.rope_scaling, arch.rope_theta) == (8, 8, None, 10_000.0)
