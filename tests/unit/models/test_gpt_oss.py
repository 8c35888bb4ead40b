"""Models of the type of gpt-oss: what is read, what is refused, what it costs."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from megatron_dypo.config.fp8 import Fp8Config
from megatron_dypo.config.model import ParallelConfig
from megatron_dypo.models.architecture import Architecture, architecture_from_hf
from megatron_dypo.models.flops import sequence_cost
from megatron_dypo.models.layout_rules import check_fp8_sizes, check_layout
from megatron_dypo.models.quantized.refusals import require_quantizable
from megatron_dypo.models.windows import Windows, windows_from_data
from megatron_dypo.planning.parameters import active_parameters, served_bytes, whole_model

GPT_OSS_20B: dict[str, Any] = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "vocab_size": 201088,
    "max_position_embeddings": 131072,
    "sliding_window": 128,
    "attention_bias": True,
    "rope_theta": 150000,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "rms_norm_eps": 1e-5,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
}
GPT_OSS_120B = {**GPT_OSS_20B, "num_hidden_layers": 36, "num_local_experts": 128}


def read(raw: dict[str, Any] = GPT_OSS_20B, **changes: Any) -> Architecture:
    return architecture_from_hf({**raw, **changes}, where="config.json")


@pytest.mark.parametrize(("raw", "billions", "active"), [(GPT_OSS_20B, 20.91, 3.61), (GPT_OSS_120B, 116.83, 5.13)])
def test_parameters_are_the_published_ones(raw, billions, active):
    """The model card (arXiv 2508.10925, table 1) counts the output layer among the active ones, not the embedding."""
    arch = read(raw)
    embedding = arch.vocab_size * arch.hidden_size
    assert whole_model(arch).total / 1e9 == pytest.approx(billions, abs=0.005)
    assert (active_parameters(arch) + embedding) / 1e9 == pytest.approx(active, abs=0.005)
    assert served_bytes(arch, 2, "none").total == 2 * whole_model(arch).total


def test_every_other_layer_sees_a_window_from_the_first_on():
    assert read().windows == Windows(size=128, layers=tuple(range(0, 24, 2)))
    read().check_length(131072, "tokens")  # longer than the window, which attention computes with
    kinds = ["full_attention"] * 23 + ["sliding_attention"]
    assert read(layer_types=kinds).windows == Windows(size=128, layers=(23,))
    assert read(layer_types=["full_attention"] * 24).windows is None


def test_windows_survive_the_message_to_servers():
    windows = read().windows
    assert windows is not None
    assert windows_from_data(json.loads(json.dumps(dataclasses.asdict(windows)))) == windows
    assert windows_from_data(None) is None


def test_linear_flops_are_two_for_each_weight_that_a_token_meets():
    arch = read()
    heads, kv_heads, width = 64, 8, 2880
    biases = (heads + 2 * kv_heads) * 64 + width + heads + 32 + 4 * 3 * width
    norms = 2 * width
    counted = active_parameters(arch) - arch.num_layers * (biases + norms)
    assert sequence_cost(arch).linear / 6 == pytest.approx(counted, rel=1e-9)


def test_half_of_the_layers_cost_no_more_for_tokens_beyond_the_window():
    cost = sequence_cost(read())
    every = sequence_cost(read(layer_types=["full_attention"] * 24))
    assert cost(128, 0) == every(128, 0)
    assert every(8192, 0) > cost(8192, 0) > (every(8192, 0) + every.linear * 8192) / 2
    assert cost.scores(8192) / every.scores(8192) == pytest.approx(0.5 + 128 / 8192, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": False}, "attention_bias=False: only True is supported"),
        ({"attention_bias": None}, "attention_bias=None: must be true or false"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True: only False is supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': only 'silu' is supported"),
        ({"swiglu_alpha": 1.0}, "swiglu_alpha=1.0: only 1.702 is supported"),
        ({"hidden_act_alpha": 2}, "hidden_act_alpha=2: only 1.702 is supported"),
        ({"swiglu_limit": None}, "swiglu_limit=None: must be a finite number above 0"),
        ({"swiglu_limit": 0}, "swiglu_limit=0: must be a finite number above 0"),
        ({"num_experts": 16}, "num_local_experts=32: must be the same as num_experts=16"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok=1: must be from 2 to num_local_experts=32: a single weight"),
        ({"num_experts_per_tok": 33}, "num_experts_per_tok=33: must be from 2 to num_local_experts=32"),
        ({"sliding_window": None}, "sliding_window=None: must be a positive integer"),
        ({"layer_types": ["full_attention"]}, r"layer_types=.*: must list num_hidden_layers=24 times 'sliding_att"),
        ({"layer_types": ["chunked_attention"] * 24}, "layer_types=.*: must list num_hidden_layers=24 times"),
        ({"layer_types": 3}, "layer_types=3: must list num_hidden_layers=24 times"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=f"^config.json: {message}"):
        read(**changes)


def test_layouts_and_fp8_that_do_not_suit_are_refused():
    arch = read()
    check_layout(arch, ParallelConfig(tensor=2, sequence=True, expert=2, context=2))
    with pytest.raises(ValueError, match=r"parallel.tensor=2: a mixture of experts needs parallel.sequence=true"):
        check_layout(arch, ParallelConfig(tensor=2))
    with pytest.raises(ValueError, match=r"^parallel.expert_tensor=7: must be 1 for a gpt_oss model: Megatron adds"):
        check_layout(arch, ParallelConfig(expert_tensor=7))
    with pytest.raises(ValueError, match=r"^model.fp8.recipe=blockwise: must be none for a gpt_oss model"):
        check_fp8_sizes(arch, ParallelConfig(), Fp8Config(recipe="blockwise"))
    with pytest.raises(ValueError, match=r"^quantize=fp8_block: must be none for a gpt_oss model"):
        require_quantizable(arch, "fp8_block")
