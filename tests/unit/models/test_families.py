"""The name tables."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from megatron_dypo.models import architecture
from megatron_dypo.models.families.registry import ALIASES, FAMILIES, family_rows, match, stored_key
from tests.support.architectures import make_arch
from tests.support.hf_models import KINDS, MOE_KINDS, import_transformers


def test_every_family_has_a_model_in_the_tests():
    transformers = import_transformers()
    tested = {getattr(transformers, config).model_type for config, _ in (KINDS | MOE_KINDS).values()}
    assert tested == set(FAMILIES) == set(architecture.FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_hf_tensor_is_exported_once(family, tied):
    arch = make_arch(family, tied_embeddings=tied)
    names = Counter(name for row in family_rows(arch) if not row.is_copy for name in row.hf)
    assert set(names.values()) == {1}
    assert ("lm_head.weight" in names) is not tied


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_is_found_by_its_name(family):
    arch = make_arch(family)
    rows = list(family_rows(arch))
    assert [match(row.mcore, arch) for row in rows] == rows


def test_a_tied_output_layer_is_filled_from_the_embedding_and_never_exported():
    row = match("output_layer.weight", make_arch(tied_embeddings=True))
    assert row.hf == ("model.embed_tokens.weight",)
    assert row.is_copy


@pytest.mark.parametrize(("fused", "plain"), ALIASES.items())
def test_fused_norm_names_of_te_are_aliases(fused, plain):
    is_latent = "_up_proj" in fused
    arch = make_arch("deepseek_v3", experts=None) if is_latent else make_arch()
    prefix = "decoder.layers.2."
    assert match(prefix + fused, arch) == match(prefix + plain, arch)
    expected = (f"decoder.layers.{fused}", (2,))
    assert stored_key(prefix + fused, arch) == stored_key(prefix + plain, arch) == expected


def test_parameters_of_a_switch_are_there_if_the_switch_is_on():
    arch = make_arch("glm4_moe")
    without = {
        "self_attention.linear_qkv.bias": replace(arch, qkv_bias=False),
        "self_attention.q_layernorm.weight": replace(arch, qk_norm=False),
        "self_attention.k_layernorm.weight": replace(arch, qk_norm=False),
    }
    for name, off in without.items():
        assert match(f"decoder.layers.2.{name}", arch).hf
        with pytest.raises(ValueError, match=f"^decoder.layers.2.{name}: no rule of family 'glm4_moe' matches"):
            match(f"decoder.layers.2.{name}", off)


def test_rows_carry_the_layer_index():
    row = match("decoder.layers.3.mlp.linear_fc1.weight", make_arch())
    assert row.hf == ("model.layers.3.mlp.gate_proj.weight", "model.layers.3.mlp.up_proj.weight")


EXPERT = "decoder.layers.3.mlp.experts."


@pytest.mark.parametrize(("local", "grouped"), [("fc1.weight", "fc1.weight4"), ("fc2.weight", "fc2.weight4")])
def test_experts_of_either_spec_are_one_row(local, grouped):
    arch = make_arch("qwen3_moe")
    row = match(f"{EXPERT}local_experts.4.linear_{local}", arch)
    assert row == match(f"{EXPERT}linear_{grouped}", arch)
    assert row.is_expert
    assert all(name.startswith("model.layers.3.mlp.experts.4.") for name in row.hf)
    assert stored_key(row.mcore, arch) == (f"decoder.layers.mlp.experts.experts.linear_{local}", (3, 4))


def test_the_router_and_the_norm_before_experts_stand_by_themselves():
    arch = make_arch("qwen3_moe")
    router = match("decoder.layers.0.mlp.router.weight", arch)
    assert router.hf == ("model.layers.0.mlp.gate.weight",)
    assert not router.is_expert
    norm = "decoder.layers.1.pre_mlp_layernorm.weight"
    assert stored_key(norm, arch) == ("decoder.layers.pre_mlp_layernorm.weight", (1,))


def test_an_expert_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="expert 5 of a model with num_experts=5"):
        match(f"{EXPERT}local_experts.5.linear_fc1.weight", make_arch("qwen3_moe"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("decoder.layers.0.mlp.router.weight", "no rule of family 'llama' matches"),
        ("decoder.layers.0.self_attention.linear_qkv.bias", "no rule of family 'llama' matches"),
        ("decoder.layers.4.mlp.linear_fc1.weight", "layer 4 of a model with num_layers=4"),
    ],
)
def test_an_unknown_parameter_is_an_error_that_names_it(name, message):
    with pytest.raises(ValueError, match=message) as error:
        match(name, make_arch())
    assert name in str(error.value)
