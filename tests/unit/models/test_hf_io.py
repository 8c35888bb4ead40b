"""Reading and writing HF folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dypo.metrics.progress import progress
from megatron_dypo.models.architecture import load_architecture
from megatron_dypo.models.hf.read import HFReader
from megatron_dypo.models.hf.write import TensorSpec, finish_hf_folder, plan_files, write_parts
from megatron_dypo.models.load import load_hf_weights
from megatron_dypo.parallel.mesh import Mesh
from tests.support.hf_models import make_hf_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_model("qwen2", tmp_path_factory.mktemp("hf") / "qwen2", num_hidden_layers=2)


def write_folder(folder: Path, reference: Path, tensors: dict[str, torch.Tensor], max_file_bytes: int) -> None:
    folder.mkdir()
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with progress(1, "", "bytes", enabled=False) as bar:
        write_parts(folder, "part", specs, iter(tensors.items()), bar, max_file_bytes)
    finish_hf_folder(folder, reference)


def test_files_are_cut_at_the_limit_and_a_larger_tensor_has_one_to_itself():
    specs = [TensorSpec(str(size), torch.float32, (size,)) for size in (2, 1, 9, 1, 2)]
    assert [[spec.name for spec in file] for file in plan_files(specs, 12)] == [["2", "1"], ["9"], ["1", "2"]]


@pytest.mark.parametrize("max_file_bytes", [1, 60_000, 10**9])
def test_what_is_written_is_read_back(model, tmp_path, max_file_bytes):
    tensors = load_file(model / "model.safetensors")
    write_folder(tmp_path / "out", model, tensors, max_file_bytes)
    reader = HFReader(tmp_path / "out")
    reader.check_complete(load_architecture(tmp_path / "out"))
    for name, tensor in tensors.items():
        assert torch.equal(reader.slice(name)[:], tensor)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == {1: len(tensors), 10**9: 1}.get(max_file_bytes, len(files))
    assert not list((tmp_path / "out").glob("*.part"))


def test_mixed_types_stay_aligned_in_a_file(model, tmp_path):
    tensors = {
        "a": torch.ones(3, dtype=torch.bfloat16),
        "b": torch.arange(5.0),
        "c": torch.ones(1, dtype=torch.float64),
    }
    write_folder(tmp_path / "out", model, tensors, 10**9)
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)


def test_config_says_the_type_of_the_weights(model, tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(model / "model.safetensors").items()}
    write_folder(tmp_path / "out", model, tensors, 10**9)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "torch_dtype" not in config


def test_a_reader_needs_safetensors(tmp_path):
    with pytest.raises(ValueError, match="weights must be safetensors"):
        HFReader(tmp_path)


def test_a_damaged_file_is_named(model, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: not a safetensors file"):
        HFReader(tmp_path)


def test_an_index_that_lies_is_an_error(model, tmp_path):
    index = {"weight_map": {"x": "absent.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"absent\.safetensors: no such file"):
        HFReader(tmp_path)
    save_file({"y": torch.ones(1)}, tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match="tensor x is missing"):
        HFReader(tmp_path)


def test_a_parameter_of_another_shape_is_refused_before_any_is_written(model):
    arch, reader = load_architecture(model), HFReader(model)
    embedding = torch.zeros(131, 64)
    norm = torch.zeros(63)
    params = [("embedding.word_embeddings.weight", embedding), ("decoder.final_layernorm.weight", norm)]
    with pytest.raises(ValueError, match=r"decoder\.final_layernorm\.weight: the model holds \(63,\)"):
        load_hf_weights(params, reader, arch, Mesh().at(0))
    assert not embedding.any()


def test_loading_converts_to_the_parameters_type(model):
    arch, reader = load_architecture(model), HFReader(model)
    weight = torch.zeros(66, 64, dtype=torch.bfloat16)
    load_hf_weights([("output_layer.weight", weight)], reader, arch, Mesh(tensor=2).at(1))
    expected = reader.slice("lm_head.weight")[66:].bfloat16()
    assert torch.equal(weight[:65], expected)
    assert not weight[65:].any()
