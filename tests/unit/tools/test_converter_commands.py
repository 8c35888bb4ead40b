"""The converters as commands."""

from __future__ import annotations

import filecmp

from megatron_dypo.models.convert import hf_to_mcore
from megatron_dypo.parallel.mesh import Mesh
from tests.support.hf_models import make_hf_model
from tests.support.tool_commands import run_tool


def test_hf_to_mcore_and_back(tmp_path):
    source = make_hf_model("llama_tied", tmp_path / "source")
    sizes = ("--tensor-parallel", 2, "--pipeline-parallel", 2)
    there = run_tool("convert_hf_to_mcore.py", "--hf-path", source, "--mcore-path", tmp_path / "mcore", *sizes)
    assert there.returncode == 0, there.stderr
    assert there.stdout.strip() == str(tmp_path / "mcore")
    back = run_tool("convert_mcore_to_hf.py", "--hf-path", tmp_path / "hf", "--mcore-path", tmp_path / "mcore", *sizes)
    assert back.returncode == 0, back.stderr
    names = [file.name for file in source.iterdir()]
    assert filecmp.cmpfiles(source, tmp_path / "hf", names, shallow=False) == (names, [], [])


def test_both_ways_to_a_quantised_folder_give_the_same_bytes(tmp_path):
    source = make_hf_model("llama", tmp_path / "source", hidden_size=128, intermediate_size=256)
    folders = ("--hf-path", source, "--out-path", tmp_path / "direct")
    direct = run_tool("quantize_hf.py", *folders, "--quantize", "fp8_block")
    assert direct.returncode == 0, direct.stderr
    hf_to_mcore(source, tmp_path / "mcore", mesh=Mesh(tensor=2), show_progress=False)
    folders = ("--mcore-path", tmp_path / "mcore", "--hf-path", tmp_path / "hf")
    converted = run_tool("convert_mcore_to_hf.py", *folders, "--quantize", "fp8_block")
    assert converted.returncode == 0, converted.stderr
    names = [file.name for file in (tmp_path / "direct").iterdir()]
    assert filecmp.cmpfiles(tmp_path / "direct", tmp_path / "hf", names, shallow=False) == (names, [], [])


def test_bad_input_ends_with_one_line_and_writes_nothing(tmp_path):
    source = make_hf_model("llama", tmp_path / "source")
    result = run_tool(
        "convert_hf_to_mcore.py", "--hf-path", source, "--mcore-path", tmp_path / "mcore", "--tensor-parallel", 3
    )
    assert result.returncode == 1
    assert result.stderr.strip() == (
        "convert_hf_to_mcore: ValueError: tensor_parallel=3 does not divide num_attention_heads=8"
    )
    assert not (tmp_path / "mcore").exists()
