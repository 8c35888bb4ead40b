"""Model folders with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_dypo.models.architecture import architecture_from_hf, load_architecture
from megatron_dypo.models.hf.read import HFReader
from megatron_dypo.models.random_model import random_weights, write_random_model

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


def test_a_config_that_cannot_be_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model_type='gpt2'"):
        write_random_model(tmp_path / "new", {**SIZES, "model_type": "gpt2"}, seed=1)
    assert not (tmp_path / "new").exists()
