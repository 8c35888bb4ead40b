"""The round-trip check as a command: a sound model, and one that was damaged on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dypo.mcore.checkpoints.convert import hf_to_mcore
from megatron_dypo.mcore.checkpoints.roundtrip import Difference, check_roundtrip, differing_tensors
from megatron_dypo.parallel.mesh import Mesh
from tests.support.hf_models import make_hf_model
from tests.support.tool_commands import run_tool

DOWN, NORM = "model.layers.2.mlp.down_proj.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_model("mistral", tmp_path_factory.mktemp("hf") / "mistral", dtype=torch.bfloat16)


def damaged(source: Path, target: Path) -> Path:
    """Copy a model, flip one bit of one tensor, and change two numbers of another."""
    weights = load_file(source / "model.safetensors")
    weights[DOWN].view(torch.int16)[5, 7] ^= 1
    weights[NORM][3], weights[NORM][4] = float("nan"), weights[NORM][4] + 0.5
    target.mkdir()
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((source / "config.json").read_text())
    return target


def test_a_sound_model_passes_and_leaves_nothing_behind(model, tmp_path):
    sizes = ("--tensor-parallel", 2, "--pipeline-parallel", 2)
    result = run_tool("check_roundtrip.py", "--hf-path", model, "--work-dir", tmp_path, *sizes)
    assert (result.returncode, result.stdout) == (0, "every tensor came back bit for bit\n"), result.stderr
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_other_weights_fails_with_a_table(model, tmp_path):
    other = damaged(model, tmp_path / "other")
    hf_to_mcore(other, tmp_path / "mcore", mesh=Mesh(pipeline=2), show_progress=False)
    result = run_tool("check_roundtrip.py", "--hf-path", model, "--mcore-path", tmp_path / "mcore")
    assert result.returncode == 1, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[:3] for line in lines] == [
        ["tensor", "shape", "elements"],
        [DOWN, "64×96", "1"],
        [NORM, "64", "2"],
    ]


def test_bad_input_ends_with_one_line(model):
    result = run_tool("check_roundtrip.py", "--hf-path", model, "--tensor-parallel", 3)
    assert result.returncode == 1
    assert result.stderr.strip() == (
        "check_roundtrip: ValueError: tensor_parallel=3 does not divide num_attention_heads=8"
    )


@pytest.mark.parametrize("kind", ["qwen3_moe", "llama_tied", "llama2"])
def test_other_models_come_back_too(kind, tmp_path):
    source = make_hf_model(kind, tmp_path / kind)
    mesh = Mesh(tensor=4, pipeline=2)
    assert check_roundtrip(source, tmp_path / "work", mesh=mesh, show_progress=False) == []


def test_differences_are_counted_bit_by_bit(model, tmp_path):
    found = differing_tensors(model, damaged(model, tmp_path / "other"), show_progress=False)
    assert [(d.name, d.shape, d.num_elements) for d in found] == [(DOWN, (64, 96), 1), (NORM, (64,), 2)]
    assert found[1].largest == 0.5
    assert isinstance(found[0], Difference)
    assert 0 < found[0].largest < 0.01


def test_a_work_folder_that_is_not_there_ends_with_one_line(model, tmp_path):
    result = run_tool("check_roundtrip.py", "--hf-path", model, "--work-dir", tmp_path / "absent")
    assert result.returncode == 1
    assert result.stderr.startswith("check_roundtrip: FileNotFoundError: ")
    assert str(tmp_path / "absent") in result.stderr
    assert result.stderr.count("\n") == 1
