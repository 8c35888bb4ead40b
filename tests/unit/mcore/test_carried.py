"""Tensors that are not trained are carried through conversions bit for bit."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dypo.mcore.checkpoints.convert import hf_to_mcore, mcore_to_hf
from megatron_dypo.mcore.checkpoints.roundtrip import differing_tensors
from megatron_dypo.models.architecture import load_architecture
from megatron_dypo.models.carried import find_carried, point_to_carried
from megatron_dypo.models.hf.read import HFReader
from megatron_dypo.parallel.mesh import Mesh
from tests.support.hf_models import make_hf_model

EXTRA = {
    "model.layers.4.eh_proj.weight": torch.arange(64 * 128, dtype=torch.float32).reshape(64, 128).bfloat16(),
    "model.layers.4.embed_tokens.weight": torch.ones(131, 64),
    "model.layers.4.mlp.gate.e_score_correction_bias": torch.linspace(-1, 1, 8),
}
"""Of the layer after the last one, in types of their own."""


@pytest.fixture(params=["moonlight", "glm4_moe"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = make_hf_model(request.param, tmp_path / "source", num_nextn_predict_layers=1)
    add(folder, EXTRA)
    return folder


def add(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, **tensors}, folder / "model.safetensors", metadata={"format": "pt"})


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def convert(source: Path, tmp_path: Path) -> None:
    hf_to_mcore(source, tmp_path / "mcore", mesh=Mesh(), show_progress=False)
    mcore_to_hf(tmp_path / "mcore", tmp_path / "back", show_progress=False)


def test_a_round_trip_gives_them_back_in_their_types(source, tmp_path):
    convert(source, tmp_path)
    back = loaded(tmp_path / "back")
    for name, tensor in EXTRA.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
    assert back.keys() == loaded(source).keys()
    assert filecmp.cmp(source / "config.json", tmp_path / "back" / "config.json", shallow=False)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == back.keys()
    assert differing_tensors(source, tmp_path / "back", show_progress=False) == []


def test_a_changed_one_is_found(source, tmp_path):
    convert(source, tmp_path)
    changed = EXTRA | {"model.layers.4.embed_tokens.weight": torch.zeros(131, 64)}
    add(source, changed)
    (found,) = differing_tensors(source, tmp_path / "back", show_progress=False)
    assert found.name == "model.layers.4.embed_tokens.weight"


def test_a_checkpoint_of_a_run_names_the_folder_that_has_them(source, tmp_path):
    beside, arch = tmp_path / "hf", load_architecture(source)
    beside.mkdir()
    point_to_carried(beside, source)
    names = {spec.name for spec in find_carried(beside, arch).specs}
    assert names == EXTRA.keys()
    source.rename(tmp_path / "moved")
    with pytest.raises(
        ValueError, match=r"hf/mtp.json: folder='.*source': is not there; it has the tensors of num_nextn"
    ):
        find_carried(beside, arch)


def test_a_model_whose_files_lack_them_is_converted_with_a_warning(tmp_path, caplog):
    source = make_hf_model("moonlight", tmp_path / "source", num_nextn_predict_layers=1)
    convert(source, tmp_path)
    assert "source: num_nextn_predict_layers=1, but no such tensor is there" in caplog.messages[0]
    assert loaded(tmp_path / "back").keys() == loaded(source).keys()


def test_tensors_of_further_layers_are_refused(source):
    add(source, {"model.layers.5.eh_proj.weight": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=r"tensor model.layers.5.eh_proj.weight: no rule of family '(deepseek|glm4)"):
        HFReader(source).check_complete(load_architecture(source))
