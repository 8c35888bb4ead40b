"""Model folders with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dypo.models.architecture import Architecture, architecture_from_hf, load_architecture
from megatron_dypo.models.families.registry import family_rows
from megatron_dypo.models.hf.read import HFReader
from megatron_dypo.models.random_model import fill_random, random_weights, write_random_model
from megatron_dypo.parallel.mesh import Mesh
from megatron_dypo.parallel.position import Position

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 400,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_folder_holds_exactly_the_tensors_of_its_family(tmp_path: Path, family: str, tied: bool) -> None:
    count = write_random_model(tmp_path, {**SIZES, "model_type": family, "tie_word_embeddings": tied}, seed=3)
    arch, reader = load_architecture(tmp_path), HFReader(tmp_path)
    reader.check_complete(arch)
    assert ("lm_head.weight" in reader.names()) is not tied
    assert count == sum(torch.Size(reader.shape(name)).numel() for name in reader.names())


def test_matrices_keep_the_scale_of_their_input_and_vectors_do_nothing() -> None:
    arch = architecture_from_hf({**SIZES, "model_type": "qwen2"}, where="test")
    weights = random_weights(arch, seed=1)
    for name, weight in weights.items():
        if weight.dim() == 2:
            expected = 1.0 if "embed" in name else weight.shape[1] ** -0.5
            assert weight.std().item() == pytest.approx(expected, rel=0.1)
        else:
            assert torch.equal(weight, torch.full_like(weight, 0.0 if name.endswith(".bias") else 1.0))


def test_the_seed_decides() -> None:
    arch = architecture_from_hf({**SIZES, "model_type": "llama"}, where="test")
    first, again, other = (random_weights(arch, seed)["lm_head.weight"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "head_dim": 16,
    "norm_topk_prob": True,
    "model_type": "qwen3_moe",
}


def filled(arch: Architecture, mesh: Mesh, rank: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """Return all parameters of a rank that would hold all layers and experts."""
    position = Position(mesh=mesh, rank=rank)
    params = {}
    for row in family_rows(arch):
        shape = row.rule.mcore_shape(arch, position.shard(is_expert=row.is_expert)[1])
        params[row.mcore] = torch.full(shape, float("nan"))
    fill_random(params.items(), arch, position, seed)
    return params


@pytest.mark.parametrize("kind", [{"model_type": "qwen2"}, {"model_type": "llama", "tie_word_embeddings": True}, MOE])
def test_ranks_that_hold_the_same_parameter_draw_the_same_values(kind: dict[str, Any]) -> None:
    arch = architecture_from_hf({**SIZES, **kind}, where="test")
    mesh = Mesh(tensor=2, data=2, pipeline=1)
    first, neighbour, replica, _ = (filled(arch, mesh, rank) for rank in range(4))
    assert all(torch.isfinite(value).all() for value in first.values())
    for name, value in first.items():
        assert torch.equal(value, replica[name]), name
        is_shared = torch.equal(value, neighbour[name])
        assert is_shared == (value.dim() == 1 or "router" in name or ".experts." in name), name
    if arch.tied_embeddings:
        assert torch.equal(first["output_layer.weight"], first["embedding.word_embeddings.weight"])


def test_values_that_a_rank_draws_have_the_scale_of_the_whole_matrix() -> None:
    arch = architecture_from_hf({**SIZES, "model_type": "qwen2"}, where="test")
    params = filled(arch, Mesh(tensor=2), 1)
    assert params["decoder.layers.0.mlp.linear_fc2.weight"].std().item() == pytest.approx(96**-0.5, rel=0.1)
    assert params["embedding.word_embeddings.weight"].std().item() == pytest.approx(1.0, rel=0.1)
    assert torch.equal(params["decoder.layers.1.self_attention.linear_qkv.bias"], torch.zeros(64))
    other = filled(arch, Mesh(tensor=2), 1, seed=2)
    assert not torch.equal(other["output_layer.weight"], params["output_layer.weight"])


def test_a_config_that_cannot_be_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model_type='gpt2'"):
        write_random_model(tmp_path / "new", {**SIZES, "model_type": "gpt2"}, seed=1)
    assert not (tmp_path / "new").exists()
