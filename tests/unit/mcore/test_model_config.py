"""Configs that the model refuses, and the settings that it passes to Megatron."""

import dataclasses

import pytest
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_dypo.config.model import ModelConfig, ParallelConfig
from megatron_dypo.mcore.features import Features
from megatron_dypo.mcore.model import transformer_config
from megatron_dypo.models.experts import Experts
from megatron_dypo.models.layout_rules import check_layout
from tests.support.architectures import QWEN2 as ARCH

EXPERTS = Experts(num_experts=6, per_token=2, ffn_hidden_size=20, normalized=True, moe_aux_loss_coef=0.25)
MOE = dataclasses.replace(ARCH, family="qwen3_moe", experts=EXPERTS)


@pytest.mark.parametrize(
    ("arch", "axes", "message"),
    [
        (ARCH, {"expert": 2}, "parallel.expert=2: a qwen2 model has no experts"),
        (ARCH, {"expert_tensor": 2}, "parallel.expert_tensor=2: a qwen2 model has no experts"),
        (MOE, {"expert_tensor": 3}, "parallel.expert_tensor=3 does not divide moe_intermediate_size=20"),
        (MOE, {"expert": 4}, "parallel.expert=4 does not divide num_experts=6"),
        (MOE, {"tensor": 2}, "parallel.tensor=2: a mixture of experts needs parallel.sequence=true"),
    ],
)
def test_a_layout_that_does_not_suit_experts_is_refused(arch, axes, message):
    with pytest.raises(ValueError, match=message):
        check_layout(arch, ParallelConfig(**axes))


@pytest.mark.parametrize(("ours", "coefficient"), [(None, 0.25), (0.0, 0.0), (0.5, 0.5)])
def test_the_balance_coefficient_is_the_models_unless_the_config_names_one(ours, coefficient):
    features = Features(transformer_engine=False, grad_accumulation_fusion=False)
    parallel = ParallelConfig(expert=2, expert_tensor=4, tensor=2, sequence=True)
    config = transformer_config(MOE, ModelConfig(hf_path="x", moe_aux_loss_coef=ours), parallel, features)
    assert config.moe_aux_loss_coeff == coefficient
    assert (config.expert_model_parallel_size, config.expert_tensor_parallel_size) == (2, 4)
    assert not config.moe_router_pre_softmax


@pytest.mark.parametrize("virtual_pipeline", [None, 2, 3])
def test_interleaving_never_meets_batched_p2p(virtual_pipeline):
    parallel = ParallelConfig(pipeline=2, virtual_pipeline=virtual_pipeline)
    features = Features(transformer_engine=False, grad_accumulation_fusion=False)
    config = transformer_config(ARCH, ModelConfig(hf_path="x"), parallel, features)
    assert config.batch_p2p_comm == (virtual_pipeline is None)
    assert config.overlap_p2p_comm == (virtual_pipeline is not None)


@pytest.mark.parametrize(
    ("num_layers", "axes"),
    [
        (94, {"pipeline": 4, "first_stage_layers": 23, "last_stage_layers": 23}),
        (94, {"pipeline": 8, "first_stage_layers": 10}),
        (94, {"pipeline": 2, "last_stage_layers": 44}),
        (12, {"pipeline": 2, "first_stage_layers": 4, "last_stage_layers": 8}),
        (12, {"pipeline": 2, "virtual_pipeline": 3}),
        (12, {"pipeline": 2, "virtual_pipeline": 2, "first_stage_layers": 4, "last_stage_layers": 8}),
        (20, {"pipeline": 4, "virtual_pipeline": 2, "first_stage_layers": 2, "last_stage_layers": 6}),
        (16, {"pipeline": 3, "virtual_pipeline": 2, "last_stage_layers": 4}),
    ],
)
def test_megatron_builds_the_layers_of_the_mesh(num_layers, axes):
    parallel, arch = ParallelConfig(**axes), dataclasses.replace(ARCH, num_layers=num_layers)
    features = Features(transformer_engine=False, grad_accumulation_fusion=False)
    config = transformer_config(arch, ModelConfig(hf_path="x"), parallel, features)
    for stage, chunks in enumerate(parallel.mesh().chunks(num_layers)):
        for number, chunk in enumerate(chunks):
            vp_stage = number if len(chunks) > 1 else None
            first = get_transformer_layer_offset(config, vp_stage, stage)
            assert chunk == range(first, first + get_num_layers_to_build(config, vp_stage, stage))
