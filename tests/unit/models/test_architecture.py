"""Reading an architecture from an HF config, and refusing configs."""

import pytest

from megatron_dypo.models.architecture import FAMILIES, architecture_from_hf
from megatron_dypo.models.experts import Experts
from megatron_dypo.models.hf.rope_scaling import YarnRopeScaling
from tests.support.hf_config_oracle import as_transformers_reads, config_from, differences
from tests.support.smallest_configs import SIZES, YARN, smallest

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
    assert arch.experts == Experts(
        num_experts=4, per_token=2, ffn_hidden_size=40, normalized=True, moe_aux_loss_coef=0.01
    )
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


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_as_transformers_has_it(family):
    raw = smallest(family)
    assert differences(architecture_from_hf(raw, where="config.json"), as_transformers_reads(config_from(raw))) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_must_be_given(family):
    for name in smallest(family).keys() - {"model_type"}:
        raw = {key: value for key, value in smallest(family).items() if key != name}
        missing = "num_local_experts" if name == "num_experts" else name
        with pytest.raises(ValueError, match=f"^config.json: {missing} is missing: must be a positive integer"):
            architecture_from_hf(raw, where="config.json")


@pytest.mark.parametrize(
    ("family", "nulls"),
    [
        ("llama", ["num_key_value_heads", "head_dim"]),
        ("mistral", ["head_dim", "sliding_window"]),
        ("qwen2", ["num_key_value_heads", "head_dim"]),
        ("qwen3", ["num_key_value_heads"]),
        ("qwen3_moe", ["head_dim", "mlp_only_layers"]),
        ("deepseek_v3", ["q_lora_rank"]),
        ("glm4_moe", ["rope_scaling"]),
    ],
)
def test_null_means_what_it_means_to_transformers(family, nulls):
    kv_heads = 16 if family == "deepseek_v3" else 8
    raw = {**smallest(family), "num_attention_heads": 16, "num_key_value_heads": kv_heads, **dict.fromkeys(nulls)}
    assert differences(architecture_from_hf(raw, where="config.json"), as_transformers_reads(config_from(raw))) == []


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("mistral", "num_key_value_heads"),
        ("qwen3_moe", "num_key_value_heads"),
        ("qwen3", "head_dim"),
        ("llama", "rms_norm_eps"),
        ("llama", "tie_word_embeddings"),
        ("llama", "rope_theta"),
        ("qwen3_moe", "norm_topk_prob"),
        ("qwen3_moe", "router_aux_loss_coef"),
        ("qwen2", "vocab_size"),
        ("glm4_moe", "head_dim"),
        ("glm4_moe", "num_key_value_heads"),
        ("glm4_moe", "use_qk_norm"),
    ],
)
def test_null_is_no_default_where_transformers_has_none(family, name):
    with pytest.raises(ValueError, match=f"^config.json: {name}=None: must be "):
        architecture_from_hf({**smallest(family), name: None}, where="config.json")


NO_NUMBERS: list[object] = [None, "x", True, [], {}, float("nan"), float("inf"), 10**400]


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta"])
def test_a_number_must_be_finite_and_a_number(name, value):
    with pytest.raises(ValueError, match=f"^config.json: {name}=.*: must be a finite number above [01]$"):
        architecture_from_hf({**smallest("llama"), name: value}, where="config.json")


@pytest.mark.parametrize("value", [*NO_NUMBERS, 0, -1, 1.5, 64.0, 2**31])
@pytest.mark.parametrize("name", [*SIZES, "num_key_value_heads", "head_dim"])
def test_a_size_must_be_a_positive_integer(name, value):
    if value is None and name in ("num_key_value_heads", "head_dim"):
        return
    with pytest.raises(ValueError, match=f"^config.json: {name}=.*: must be a positive integer"):
        architecture_from_hf({**smallest("llama"), name: value}, where="config.json")


@pytest.mark.parametrize("value", [None, "false", 0, 1, []])
def test_a_flag_must_be_true_or_false(value):
    with pytest.raises(ValueError, match=r"^config.json: tie_word_embeddings=.*: must be true or false"):
        architecture_from_hf({**smallest("llama"), "tie_word_embeddings": value}, where="config.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 25}, "head_dim=25: must be even"),
        ({"hidden_size": 4095}, "hidden_size=4095: must be a multiple of num_attention_heads=32"),
        (
            {"num_attention_heads": 8, "model_type": "qwen2"},
            r"num_key_value_heads=32 \(transformers' default for model_t",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=.*: only 'full_attention'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: only 1 is supported"),
        ({"attention_bias": "false"}, "attention_bias='false': only False"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': only 'silu'"),
        ({"model_type": ["llama"]}, r"model_type=\['llama'\]: must be one of"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn': must be an object"),
        ({"rope_parameters": [1]}, r"rope_parameters=\[1\]: must be an object"),
    ],
)
def test_a_field_that_is_not_computed_with_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"^config.json: {message}"):
        architecture_from_hf({**smallest("llama"), **changes}, where="config.json")


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "said",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": YARN},
        {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": YARN},
        {"rope_parameters": YARN, "rope_scaling": {**YARN, "factor": 2.0}},
        {"rope_parameters": YARN, "rope_scaling": {**YARN, "attention_factor": 2.0}},
        {"rope_parameters": YARN, "rope_scaling": LLAMA3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": 1e4},
        {"rope_parameters": {**YARN, "rope_theta": 1e6}, "rope_scaling": YARN},  # transformers: 10,000
        {"rope_scaling": {**YARN, "rope_theta": 1e6}, "rope_theta": 1e4},
        {"rope_scaling": YARN, "original_max_position_embeddings": 64},
    ],
)
def test_two_places_that_contradict_each_other_are_refused(said):
    with pytest.raises(ValueError, match=r"^config.json: (rope_|original_).* says .* and .* says .*: must be the same"):
        architecture_from_hf({**smallest("qwen2"), **said}, where="config.json")


@pytest.mark.parametrize(
    "said",
    [
        {"rope_parameters": {**YARN, "rope_theta": 1e6}, "rope_scaling": YARN, "rope_theta": 1e6},
        {"rope_parameters": {**YARN, "rope_theta": 1e6}, "rope_scaling": {**YARN, "type": "yarn", "rope_theta": 1e6}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": None, "rope_theta": 1e6},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": {}},
        {"rope_scaling": {"type": "linear", "factor": 4}, "rope_theta": 1e6},
        {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32}, "rope_theta": 1e6},
        {"rope_scaling": {"type": "yarn", "factor": 4}},
        {"rope_scaling": {"type": "yarn", "factor": 4}, "original_max_position_embeddings": 32},
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 256}, "rope_theta": 5e5},
    ],
)
def test_rotary_positions_are_read_in_the_words_of_transformers_4_and_5(said):
    raw = {**smallest("qwen2"), **said}
    assert differences(architecture_from_hf(raw, where="config.json"), as_transformers_reads(config_from(raw))) == []


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (
            {"type": "dynamic", "factor": 2.0},
            "rope_scaling.type='dynamic': is not supported: its frequencies depend on",
        ),
        (
            {"rope_type": "longrope"},
            "rope_scaling.rope_type='longrope': must be 'default' or one of linear, llama3, yarn",
        ),
        ({"rope_type": None, "factor": 4.0}, "rope_scaling.rope_type=None: must be"),
        ({**YARN, "type": "linear"}, "rope_scaling.rope_type='yarn': must be the same as type='linear'"),
        ({"rope_type": "yarn"}, "rope_scaling.factor is missing: must be a finite number of at least 1"),
        ({**YARN, "factor": 0.5}, "rope_scaling.factor=0.5: must be"),
        (
            {**YARN, "factor": 1e16},
            r"rope_scaling.factor=1e\+16: must be a finite number of at least 1 and of at most 10000",
        ),
        ({**YARN, "factor": "4"}, "rope_scaling.factor='4': must be"),
        ({**YARN, "original_max_position_embeddings": 0}, "rope_scaling.original_max_position_embeddings=0: must be"),
        ({**YARN, "beta_fast": 1, "beta_slow": 32}, "rope_scaling.beta_fast=1: must be at least beta_slow=32"),
        ({**YARN, "attention_factor": 0}, "rope_scaling.attention_factor=0: must be"),
        ({**YARN, "mscale": "1"}, "rope_scaling.mscale='1': must be"),
        ({**YARN, "truncate": None}, "rope_scaling.truncate=None: must be true or false"),
        ({**YARN, "attn_factor": 2.0}, "rope_scaling.attn_factor=2.0: is no parameter of rope_type='yarn'"),
        ({"full_attention": YARN}, "rope_scaling.full_attention=.*: is no parameter of rope_type='default'"),
        ({"rope_type": "default", "factor": 4.0}, "rope_scaling.factor=4.0: is no parameter of rope_type='default'"),
        ({**LLAMA3, "high_freq_factor": 1.0}, "rope_scaling.high_freq_factor=1.0: must be above low_freq_factor=1"),
        ({**LLAMA3, "low_freq_factor": 0}, "rope_scaling.low_freq_factor=0: must be a finite number above 0"),
        ({**YARN, "partial_rotary_factor": 0.5}, "rope_scaling.partial_rotary_factor=0.5: only 1"),
    ],
)
def test_a_scaling_that_is_not_understood_is_refused(scaling, message):
    with pytest.raises(ValueError, match=f"^config.json: {message}"):
        architecture_from_hf({**smallest("qwen2"), "rope_scaling": scaling}, where="config.json")


@pytest.mark.parametrize(
    ("said", "positions"),
    [
        ({}, 512),
        ({"rope_scaling": LLAMA3}, 512),
        ({"rope_scaling": {"type": "linear", "factor": 2.5}}, 1280),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 512}}, 2048),  # as Qwen2.5 gives them
        ({"rope_scaling": YARN}, 512),  # positions after scaling
    ],
)
def test_more_tokens_than_positions_are_said(said, positions):
    arch = architecture_from_hf({**smallest("llama"), **said}, where="config.json")
    assert arch.num_positions == positions
    assert arch.check_positions(positions) is None
    note = arch.check_positions(positions + 1)
    assert note is not None
    assert f"sequences of up to {positions + 1} tokens: the model supports {positions} " in note
    assert ("under" in note) == (positions > 512)


def test_what_sglang_serves_otherwise_is_said():
    def note(rope, num_tokens):
        return architecture_from_hf({**smallest("qwen2"), "rope_scaling": rope}, where="").check_serving(num_tokens)

    assert note(None, 10**6) is None
    assert note(YARN, 512) is None
    assert "SGLang ignores it and uses 1.13863" in note({**YARN, "attention_factor": 1.0}, 512)
    assert note({**YARN, "attention_factor": 1.1386294361119891}, 512) is None
    assert "--context-length 2048" in note({**YARN, "original_max_position_embeddings": 512}, 513)


def test_a_scaling_survives_the_message_to_servers():
    import dataclasses

    from megatron_dypo.models.hf.rope_scaling import rope_scaling_from_data

    for rope in (YARN, LLAMA3, {"type": "linear", "factor": 2.0}):
        scaling = architecture_from_hf({**smallest("qwen2"), "rope_scaling": rope}, where="").rope_scaling
        assert scaling is not None
        assert rope_scaling_from_data(dataclasses.asdict(scaling)) == scaling
    assert rope_scaling_from_data(None) is None
    assert isinstance(
        architecture_from_hf({**smallest("qwen2"), "rope_scaling": YARN}, where="").rope_scaling, YarnRopeScaling
    )
