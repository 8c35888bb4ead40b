"""Experts that an HF folder stores in one tensor, in bf16 or MXFP4."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dypo.mcore.checkpoints.convert import hf_to_mcore, mcore_to_hf
from megatron_dypo.models.architecture import load_architecture
from megatron_dypo.models.families.registry import family_rows
from megatron_dypo.models.hf.read import HFReader
from megatron_dypo.models.quantized.mxfp4 import dequantize
from megatron_dypo.models.stacked_experts import stored_names, stored_tensors
from megatron_dypo.parallel.mesh import Mesh
from tests.support.hf_models import import_transformers, make_hf_model

EXPERTS = "model.layers.1.mlp.experts."


def as_transformers_reads(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return transformers' own values, [E, K, N] bf16."""
    import_transformers()
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    values: torch.Tensor = convert_moe_packed_tensors(blocks, scales)
    return values


def test_mxfp4_is_read_as_transformers_reads_it():
    """Every pair of values, under every scale but 255, which stands for no number."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 255, 1, 1)
    scales = torch.arange(255, dtype=torch.uint8)[None, :, None].repeat(2, 1, 16)
    blocks[1] = blocks[0].flip(1, 2)
    expected = as_transformers_reads(blocks, scales)
    assert expected.shape == (2, 512, 255)
    for expert in range(2):
        ours = dequantize(blocks[expert], scales[expert])
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours.T, expected[expert])


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with experts in MXFP4, as gpt-oss is published."""
    path = make_hf_model("gpt_oss", tmp_path_factory.mktemp("mxfp4") / "hf", dtype=torch.bfloat16)
    weights = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = weights.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        weights[name + "_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        weights[name + "_scales"] = torch.randint(118, 124, shape, dtype=torch.uint8, generator=generator)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_folder_in_mxfp4_is_converted_to_one_in_bf16(published, tmp_path):
    hf_to_mcore(published, tmp_path / "mcore", mesh=Mesh(tensor=2, pipeline=2), show_progress=False)
    mcore_to_hf(tmp_path / "mcore", tmp_path / "hf", show_progress=False)
    before, after = load_file(published / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    for name, tensor in after.items():
        if name + "_blocks" in before:
            expected = as_transformers_reads(before.pop(name + "_blocks"), before.pop(name + "_scales"))
        else:
            expected = before.pop(name)
        assert torch.equal(tensor, expected), name
    assert not before
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        import_transformers().AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(tokens)


def test_parts_of_stacks_are_stacked_again(tmp_path):
    path = make_hf_model("gpt_oss", tmp_path / "hf")
    arch, reader = load_architecture(path), HFReader(path)
    names = [name for row in family_rows(arch) for name in row.hf]
    original = load_file(path / "model.safetensors")
    assert sorted(stored_names(names, arch)) == sorted(original)
    parts = {name: reader.slice(name)[:] for name in names}
    assert all(list(parts[name].shape) == reader.slice(name).get_shape() for name in names)
    stacked = dict(stored_tensors(parts.items(), arch))
    assert stacked.keys() == original.keys()
    assert all(torch.equal(stacked[name], tensor) for name, tensor in original.items())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop(EXPERTS + "down_proj"), "tensor {}down_proj is missing"),
        (lambda w: w.update({EXPERTS + "down_proj_bias": torch.ones(4, 65)}), "tensor {}down_proj_bias has shape"),
        (lambda w: w.update({EXPERTS + "0.up_proj.weight": torch.ones(1)}), "tensor {}0.up_proj.weight: no rule of"),
    ],
)
def test_a_stack_that_is_missing_or_misshapen_is_refused(edit, message, tmp_path):
    path = make_hf_model("gpt_oss", tmp_path / "hf")
    weights = load_file(path / "model.safetensors")
    edit(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message.format(EXPERTS)):
        HFReader(path).check_complete(load_architecture(path))


def test_a_part_of_mxfp4_that_is_missing_is_refused(published, tmp_path):
    weights = load_file(published / "model.safetensors")
    del weights[EXPERTS + "gate_up_proj_scales"]
    weights[EXPERTS + "down_proj_scales"] = weights[EXPERTS + "down_proj_scales"].to(torch.int8)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"gate_up_proj_scales is missing.*down_proj_scales has type I8, MXFP4 needs"):
        HFReader(tmp_path).check_complete(load_architecture(published))
