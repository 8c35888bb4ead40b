"""The name tables."""

from __future__ import annotations

from collections import Counter

import pytest

from megatron_dypo.weights.families.registry import ALIASES, FAMILIES, family_rows, match, stored_key
from tests.unit.weights.architectures import make_arch


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
    arch = make_arch()
    prefix = "decoder.layers.2."
    assert match(prefix + fused, arch) == match(prefix + plain, arch)
    assert stored_key(prefix + fused) == stored_key(prefix + plain) == (f"decoder.layers.{fused}", 2)


def test_rows_carry_the_layer_index():
    row = match("decoder.layers.3.mlp.linear_fc1.weight", make_arch())
    assert row.hf == ("model.layers.3.mlp.gate_proj.weight", "model.layers.3.mlp.up_proj.weight")


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
