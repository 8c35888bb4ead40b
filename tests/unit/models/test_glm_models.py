"""Models of the type of GLM-4.5: what is read, what is refused, what it costs."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from megatron_dypo.config.fp8 import Fp8Config
from megatron_dypo.config.model import ParallelConfig
from megatron_dypo.mcore.rope import inverse_frequencies, rotated_scale, softmax_scale
from megatron_dypo.models.architecture import Architecture, architecture_from_hf
from megatron_dypo.models.flops import sequence_cost
from megatron_dypo.models.layout_rules import check_fp8_sizes, check_layout
from megatron_dypo.planning.parameters import active_parameters, served_bytes, whole_model
from tests.support.hf_config_oracle import as_transformers_reads, config_from, differences
from tests.support.planning_cases import ROOT
from tests.support.smallest_configs import YARN, smallest

GLM: dict[str, Any] = json.loads((ROOT / "megatron_dypo/planning/models/glm-4.5/config.json").read_text())
AIR: dict[str, Any] = json.loads((ROOT / "megatron_dypo/planning/models/glm-4.5-air/config.json").read_text())
TINY: dict[str, Any] = {**smallest("glm4_moe"), "head_dim": 24}


def read(raw: dict[str, Any], **changes: Any) -> Architecture:
    return architecture_from_hf({**raw, **changes}, where="config.json")


@pytest.mark.parametrize(("raw", "billions", "active"), [(GLM, 358.338, 32.08), (AIR, 110.469, 12.18)])
def test_parameters_are_those_of_the_published_files(raw, billions, active):
    """The files also have the layer that predicts further tokens: a layer with experts, a projection of two hidden
    states, three norms, and copies of the embedding and the output layer. Active: 32B and 12B, without embeddings."""
    arch = read(raw)
    hidden, vocab = arch.hidden_size, arch.vocab_size
    layer = whole_model(dataclasses.replace(arch, num_layers=arch.num_layers + 1)).total - whole_model(arch).total
    extra = layer + 2 * hidden**2 + 3 * hidden + 2 * vocab * hidden
    assert (whole_model(arch).total + extra) / 1e9 == pytest.approx(billions, rel=1e-5)
    assert active_parameters(arch) / 1e9 == pytest.approx(active, rel=1e-3)
    assert served_bytes(arch, 2, "none").total == 2 * whole_model(arch).total


@pytest.mark.parametrize("raw", [GLM, AIR])
def test_linear_flops_are_two_for_each_weight_that_a_token_meets(raw):
    arch = read(raw)
    biases = (raw["num_attention_heads"] + 2 * raw["num_key_value_heads"]) * raw["head_dim"]
    norms = 2 * arch.hidden_size + (2 * arch.head_dim if raw["use_qk_norm"] else 0)
    router_biases = raw["n_routed_experts"] * (arch.num_layers - raw["first_k_dense_replace"])
    counted = active_parameters(arch) - (norms + biases) * arch.num_layers - router_biases
    assert sequence_cost(arch).linear / 6 == pytest.approx(counted, rel=1e-9)
    assert sequence_cost(arch).quadratic == 6 * arch.num_layers * 96 * 128


def test_switches_are_read():
    assert (read(GLM).qkv_bias, read(GLM).qk_norm) == (True, True)
    assert (read(AIR).qkv_bias, read(AIR).qk_norm) == (True, False)
    assert (read(TINY).qkv_bias, read(TINY).qk_norm, read(TINY).num_mtp_layers) == (False, False, 1)


ROPES: list[dict[str, Any]] = [
    {},
    {"partial_rotary_factor": 0.25},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.75}},
    {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_scaling": dict(YARN)},
    {"partial_rotary_factor": 1, "rope_theta": 1e6},
    {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 1e5},
    {"rope_scaling": {**YARN, "attention_factor": 0.8}},
]


@pytest.mark.parametrize("said", ROPES)
def test_a_share_of_each_head_is_rotated_as_in_transformers(said):
    arch = read(TINY, **said)
    assert differences(arch, as_transformers_reads(config_from({**TINY, **said}))) == []
    assert inverse_frequencies(arch).shape == (arch.rotary_dim // 2,)


def test_the_attention_factor_is_for_rotated_channels_alone():
    whole, part = (read(TINY, rope_scaling=YARN, partial_rotary_factor=share) for share in (1.0, 0.5))
    factor = 0.1 * torch.tensor(4.0, dtype=torch.float64).log().item() + 1
    assert softmax_scale(part) is None
    assert rotated_scale(part) == pytest.approx(factor)
    assert softmax_scale(whole) == pytest.approx(factor**2 / 24**0.5)
    assert rotated_scale(whole) == 1.0
    assert rotated_scale(read(TINY)) == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True: only False is supported"),
        ({"norm_topk_prob": False}, "norm_topk_prob=False: only true is supported"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax': only 'sigmoid' is supported"),
        ({"n_group": 7}, "n_group=7: must divide n_routed_experts=160"),
        ({"topk_group": 2}, "topk_group=2: must not exceed n_group=1"),
        ({"n_group": 8, "topk_group": 2}, "num_experts_per_tok=8: must be 2 × topk_group=2: Megatron ranks a group"),
        ({"first_k_dense_replace": 92}, "first_k_dense_replace=92: must be below num_hidden_layers=92"),
        ({"attention_bias": None}, "attention_bias=None: must be true or false"),
        ({"use_qk_norm": 1}, "use_qk_norm=1: must be true or false"),
        ({"n_shared_experts": None}, "n_shared_experts=None: must be a positive integer"),
        ({"head_dim": None}, "head_dim=None: must be a positive integer"),
        ({"num_key_value_heads": None}, "num_key_value_heads=None: must be a positive integer"),
        ({"partial_rotary_factor": None}, "partial_rotary_factor=None: must be a finite number above 0"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5: must be a finite number above 0 and of at most 1"),
        ({"partial_rotary_factor": 0.26}, "partial_rotary_factor=0.26 of head_dim=128: must give an even number"),
        ({"partial_rotary_factor": 0.001}, "partial_rotary_factor=0.001 of head_dim=128: must give an even number"),
        (
            {"rope_parameters": {"rope_theta": 1000000, "partial_rotary_factor": 0.25}},
            "partial_rotary_factor says 0.5 and rope_parameters.partial_rotary_factor says 0.25: must be the same",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=f"^config.json: {message}"):
        read(GLM, **changes)


def test_layouts_and_fp8_that_do_not_suit_are_refused():
    arch = read(AIR)
    check_layout(arch, ParallelConfig(tensor=2, sequence=True, expert=2))
    with pytest.raises(ValueError, match=r"parallel.tensor=2: a mixture of experts needs parallel.sequence=true"):
        check_layout(arch, ParallelConfig(tensor=2))
    with pytest.raises(ValueError, match=r"parallel.tensor=16 does not divide num_key_value_heads=8"):
        check_layout(arch, ParallelConfig(tensor=16, sequence=True))
    with pytest.raises(ValueError, match=r"^model.fp8.recipe=blockwise: must be none for a glm4_moe model: FP8"):
        check_fp8_sizes(arch, ParallelConfig(), Fp8Config(recipe="blockwise"))
