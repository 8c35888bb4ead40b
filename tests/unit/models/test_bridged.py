"""The config.json of models whose names come from Megatron-Bridge, read without it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_dypo.config.model import ModelConfig, ParallelConfig
from megatron_dypo.models.bridged import architecture_of, load_bridged, tabled_architecture
from megatron_dypo.models.carried import point_to_carried
from megatron_dypo.models.layout_rules import check_layout

NEMOTRON: dict[str, Any] = {
    "model_type": "nemotron",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 131,
    "max_position_embeddings": 256,
    "norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0, "partial_rotary_factor": 0.5},
}


def write(folder: Path, **changes: Any) -> Path:
    values = {name: value for name, value in {**NEMOTRON, **changes}.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_sizes_are_read_and_the_family_has_no_table(tmp_path: Path) -> None:
    arch = architecture_of(ModelConfig(hf_path=str(write(tmp_path)), family="bridge"))
    assert (arch.family, arch.num_layers, arch.head_dim, arch.vocab_size) == ("nemotron", 4, 8, 131)
    assert (arch.norm_epsilon, arch.rope_theta) == (1e-5, 20_000.0)
    assert arch.is_bridged


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama': has a name table here: set model.family=auto"),
        ({"model_type": "absent"}, "model_type is missing: must be a text"),
        ({"num_experts": 8}, "num_experts=8: a model with experts cannot be trained with model.family=bridge"),
        ({"n_routed_experts": 8}, "n_routed_experts=8: a model with experts"),
        ({"vocab_size": "absent"}, "vocab_size is missing"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type='yarn': must be 'default'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.type='linear': must be 'default'"),
        ({"norm_eps": -1}, "norm_eps=-1"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_in_one_line(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_bridged(write(tmp_path, **changes))
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_that_ranks_cannot_share_is_refused(tmp_path: Path) -> None:
    arch = load_bridged(write(tmp_path))
    with pytest.raises(ValueError, match=r"parallel\.tensor=2: does not divide vocab_size=131"):
        check_layout(arch, ParallelConfig(tensor=2))
    check_layout(arch, ParallelConfig())
    with pytest.raises(ValueError, match=r"parallel\.expert=2: a nemotron model has no experts"):
        check_layout(arch, ParallelConfig(expert=2))


def test_an_unknown_family_names_the_way_to_train_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model_type='nemotron': must be one of .*model\.family=bridge"):
        architecture_of(ModelConfig(hf_path=str(write(tmp_path))))


def test_what_needs_a_table_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.family=bridge: must be auto for megatron-dypo plan, which needs"):
        tabled_architecture(ModelConfig(hf_path=str(write(tmp_path)), family="bridge"), "megatron-dypo plan")


def test_a_checkpoint_of_it_points_to_no_carried_tensors(tmp_path: Path) -> None:
    (tmp_path / "beside").mkdir()
    point_to_carried(tmp_path / "beside", write(tmp_path))
    assert not list((tmp_path / "beside").iterdir())
