"""Safetensors files of an HF folder: missing, damaged or contradictory files are reported, and no others are read."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dypo.models.architecture import load_architecture
from megatron_dypo.models.hf.files import INDEX_NAME, SINGLE_NAME, SafetensorsFiles
from megatron_dypo.models.hf.read import HFReader, warn_once
from megatron_dypo.models.load import load_hf_weights
from megatron_dypo.parallel.mesh import Mesh
from tests.support.hf_models import import_transformers, make_hf_model

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 663\n"


def write(folder: Path, weight_map: object, **files: dict[str, torch.Tensor]) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for stem, tensors in files.items():
        save_file(tensors, folder / f"{stem}.safetensors")


X, Y = {"x": torch.zeros(3)}, {"y": torch.ones(2)}


def test_tensors_are_found_in_the_files_that_the_index_names(tmp_path):
    write(tmp_path, {"y": "b.safetensors", "x": "a.safetensors"}, a=X, b=Y)
    files = SafetensorsFiles(tmp_path)
    assert list(files.file_of.items()) == [("y", "b.safetensors"), ("x", "a.safetensors")]
    assert torch.equal(files.slice("y")[:], Y["y"])


def test_a_tensor_that_the_index_passes_over_is_found_too(tmp_path):
    write(tmp_path, {"x": "a.safetensors"}, a={**X, **Y})
    assert SafetensorsFiles(tmp_path).file_of == {"x": "a.safetensors", "y": "a.safetensors"}


BAD_MAPS = {
    "null": (None, "weight_map=None: must be an object"),
    "list": (["x"], r"weight_map=\['x'\]: must be an object"),
    "empty": ({}, r"weight_map=\{\}: must be an object"),
    "number": ({"x": 5}, "weight_map.x=5: must be the name of a file"),
    "NUL": ({"x": "a\0"}, r"weight_map.x='a\\x00': must be the name of a file"),
    "parent": ({"x": "../a.safetensors"}, "weight_map.x='../a.safetensors': must be a file of this folder"),
    "absolute": ({"x": "/etc/passwd"}, "weight_map.x='/etc/passwd': must be a file of this folder"),
    "absent": ({"x": "a.safetensors", "y": "b.safetensors"}, "b.safetensors: no such file, although .* tensor y"),
    "folder": ({"x": "."}, "no such file, although model.safetensors.index.json names it for tensor x"),
    "other file": ({"x": "a.safetensors", "y": "a.safetensors"}, "a.safetensors: tensor y is missing, although"),
}


@pytest.mark.parametrize("name", BAD_MAPS)
def test_an_index_that_is_none_or_lies_is_refused(name, tmp_path):
    weight_map, message = BAD_MAPS[name]
    write(tmp_path, weight_map, a=X)
    with pytest.raises(ValueError, match=message):
        HFReader(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"metadata": {}}', LFS, b"\xff", b"[" * 100_000])
def test_an_index_that_is_not_json_names_itself(content, tmp_path):
    (tmp_path / INDEX_NAME).write_bytes(content)
    with pytest.raises(ValueError, match=f"^{tmp_path}/{INDEX_NAME}: "):
        HFReader(tmp_path)


def test_a_tensor_that_stands_in_two_files_is_refused(tmp_path):
    write(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"}, a=X, b={**X, **Y})
    with pytest.raises(ValueError, match=r"b.safetensors: tensor x stands in a.safetensors too"):
        HFReader(tmp_path)


def test_an_index_beside_a_single_file_that_it_does_not_name_is_refused(tmp_path):
    write(tmp_path, {"x": "a.safetensors"}, a=X, model=X)
    with pytest.raises(ValueError, match=r"names other files than model.safetensors, which is there too"):
        HFReader(tmp_path)
    write(tmp_path, {"x": "model.safetensors"})
    assert HFReader(tmp_path).names() == ["x"]


DAMAGES = {
    "empty": (lambda raw: b"", r"truncated or damaged one \(0 bytes\)"),
    "header cut": (lambda raw: raw[:20], r"truncated or damaged one \(20 bytes\)"),
    "data cut": (lambda raw: raw[:-1], "truncated or damaged one"),
    "longer": (lambda raw: raw + b"x", "truncated or damaged one"),
    "git-lfs pointer": (lambda raw: LFS, "a git-lfs pointer, not the file itself: run `git lfs pull` in "),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("indexed", [True, False])
def test_a_damaged_file_says_what_it_is(name, indexed, tmp_path):
    damage, message = DAMAGES[name]
    stem = "part" if indexed else "model"
    file = tmp_path / f"{stem}.safetensors"
    save_file(X, file)
    file.write_bytes(damage(file.read_bytes()))
    if indexed:
        write(tmp_path, {"x": file.name})
    with pytest.raises(ValueError, match=f"^{file}: .*{message}"):
        HFReader(tmp_path)


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return make_hf_model("llama_tied", tmp_path / "tied", num_hidden_layers=1)


def warnings_of(folder: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="megatron_dypo"):
        for _ in range(2):
            HFReader(folder).check_complete(load_architecture(folder))
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("change", ["value", "shape", "type", "last row"])
def test_an_output_layer_that_a_tied_model_passes_over_is_said_once(change, tied, caplog):
    warn_once.cache_clear()
    weights = load_file(tied / SINGLE_NAME)
    output = weights["model.embed_tokens.weight"].clone()
    save_file({**weights, "lm_head.weight": output}, tied / SINGLE_NAME)
    assert warnings_of(tied, caplog) == []
    changed = {"value": output + 1, "shape": output[:-1], "type": output.bfloat16(), "last row": output.clone()}
    changed["last row"][-1, -1] += 1
    save_file({**weights, "lm_head.weight": changed[change]}, tied / SINGLE_NAME)
    (message,) = warnings_of(tied, caplog)
    assert message.startswith(f"{tied / SINGLE_NAME}: tensor lm_head.weight differs from model.embed_tokens.weight, ")


def test_weights_that_are_not_finite_are_said_with_file_and_tensor(tied, caplog):
    warn_once.cache_clear()
    arch, name = load_architecture(tied), "model.layers.0.self_attn.o_proj.weight"
    weights = load_file(tied / SINGLE_NAME)
    weights[name][3, 4] = float("nan")
    save_file(weights, tied / SINGLE_NAME)
    params = [
        ("decoder.layers.0.self_attention.linear_proj.weight", torch.zeros(64, 64)),
        ("decoder.final_layernorm.weight", torch.zeros(64)),
    ]
    with caplog.at_level(logging.WARNING, logger="megatron_dypo"):
        load_hf_weights(params, HFReader(tied), arch, Mesh().at(0))
    assert [record.getMessage() for record in caplog.records] == [
        f"{tied}: {name}: not every weight is a finite number"
    ]


def test_both_names_of_the_type_follow_the_weights(tied, tmp_path):
    from megatron_dypo.models.hf.write import copy_beside

    config = json.loads((tied / "config.json").read_text())
    for names in (("dtype",), ("torch_dtype",), ("dtype", "torch_dtype")):
        plain = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
        (tied / "config.json").write_text(json.dumps({**plain, **dict.fromkeys(names, "float32")}))
        target = tmp_path / "-".join(names)
        target.mkdir()
        copy_beside(tied, target, torch.bfloat16)
        written = json.loads((target / "config.json").read_text())
        assert {name: written[name] for name in written if "dtype" in name} == dict.fromkeys(names, "bfloat16")


def test_generation_with_transformers_ends_where_the_training_did(tied, tmp_path):
    from megatron_dypo.models.hf.write import copy_beside

    transformers = import_transformers()
    prompt = torch.arange(3, 9)[None]

    def generated(folder: Path) -> list[int]:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        return model.generate(prompt, do_sample=False, max_new_tokens=8)[0, prompt.shape[1] :].tolist()

    without = generated(tied)
    assert len(without) == 8
    for name, has_file in (("base", True), ("bare", False)):
        source, target = shutil.copytree(tied, tmp_path / name), tmp_path / f"{name}_export"
        if not has_file:
            (source / "generation_config.json").unlink()
        shutil.copytree(source, target)
        copy_beside(source, target, stop_ids=(without[3], 2))
        assert generated(target) == without[: without.index(without[3]) + 1]
        written = transformers.GenerationConfig.from_pretrained(target)
        assert set(written.eos_token_id) == {2, without[3]}
        assert written.bos_token_id == 1


def test_a_generation_config_that_names_every_stop_is_copied_byte_for_byte(tied, tmp_path):
    from megatron_dypo.models.hf.write import copy_beside

    text = '{"temperature": 0.7, "eos_token_id": [7, 2]}'
    (tied / "generation_config.json").write_text(text)
    (tmp_path / "copy").mkdir()
    copy_beside(tied, tmp_path / "copy", stop_ids=(2, 7))
    assert (tmp_path / "copy" / "generation_config.json").read_text() == text
    copy_beside(tied, tmp_path / "copy", stop_ids=(5, 2))
    written = json.loads((tmp_path / "copy" / "generation_config.json").read_text())
    assert written == {"temperature": 0.7, "eos_token_id": [7, 2, 5]}


def test_the_scaling_of_positions_is_written_back_unchanged(tied, tmp_path):
    from megatron_dypo.models.hf.write import copy_beside

    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": None}
    config = json.loads((tied / "config.json").read_text())
    config = {**config, "rope_parameters": None, "rope_scaling": scaling, "rope_theta": 1_000_000}
    (tied / "config.json").write_text(json.dumps(config))
    (tmp_path / "copy").mkdir()
    copy_beside(tied, tmp_path / "copy", torch.float32)
    assert json.loads((tmp_path / "copy" / "config.json").read_text()) == config
    assert load_architecture(tmp_path / "copy") == load_architecture(tied)
