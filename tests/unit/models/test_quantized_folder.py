"""FP8 folders: their content, and how transformers and SGLang read it."""

from __future__ import annotations

import filecmp
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dypo.mcore.checkpoints.convert import hf_to_mcore, mcore_to_hf
from megatron_dypo.models.architecture import load_architecture
from megatron_dypo.models.quantized.blocks import quantize
from megatron_dypo.models.quantized.folder import quantization_config, quantize_hf
from megatron_dypo.models.quantized.names import Quantization, block_shape, is_quantized, is_scale, scale_name
from megatron_dypo.parallel.mesh import Mesh
from tests.support.hf_models import import_transformers, make_hf_model

SIZES = {"hidden_size": 192, "intermediate_size": 320, "head_dim": 24, "num_hidden_layers": 2}
"""Sizes that are no multiples of 128: blocks are cut off at every edge."""
MODELS = ["qwen2", "qwen3_moe"]
KINDS: list[Quantization] = ["fp8_block", "fp8_channel"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """(model, quantization) → folder."""
    root = tmp_path_factory.mktemp("models")
    made = {}
    for model in MODELS:
        made[model, "none"] = make_hf_model(model, root / model, dtype=torch.bfloat16, **SIZES)
        for kind in KINDS:
            made[model, kind] = root / f"{model}-{kind}"
            quantize_hf(made[model, "none"], made[model, kind], kind, show_progress=False)
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS)
def test_linear_weights_are_quantised_and_the_rest_is_copied(model, kind, folders):
    plain = load_file(folders[model, "none"] / "model.safetensors")
    written = load_file(folders[model, kind] / "model.safetensors")
    expected = {}
    for name, tensor in plain.items():
        if is_quantized(name):
            expected[name], expected[scale_name(name, kind)] = quantize(tensor, kind)
        else:
            expected[name] = tensor
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name].view(torch.uint8), tensor.view(torch.uint8)), name
    config = json.loads((folders[model, kind] / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    arch = load_architecture(folders[model, "none"])
    assert config.pop("quantization_config") == quantization_config(arch, kind)
    assert config == json.loads((folders[model, "none"] / "config.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS)
def test_a_checkpoint_converts_to_what_its_conversion_quantises_to(model, kind, folders, tmp_path):
    hf_to_mcore(folders[model, "none"], tmp_path / "mcore", mesh=Mesh(tensor=2, pipeline=2), show_progress=False)
    mcore_to_hf(tmp_path / "mcore", tmp_path / "hf", quantization=kind, show_progress=False)
    names = sorted(file.name for file in folders[model, kind].iterdir())
    assert sorted(file.name for file in (tmp_path / "hf").iterdir()) == names
    assert filecmp.cmpfiles(folders[model, kind], tmp_path / "hf", names, shallow=False) == (names, [], [])


def dequantized(folder: Path, kind: Quantization) -> dict[str, torch.Tensor]:
    """Return the weights that a quantised folder stands for, in fp32."""
    written = load_file(folder / "model.safetensors")
    weights = {}
    for name, tensor in written.items():
        if is_quantized(name):
            rows, cols = block_shape(kind, tuple(tensor.shape))
            scales = written[scale_name(name, kind)].repeat_interleave(rows, 0).repeat_interleave(cols, 1)
            weights[name] = tensor.float() * scales[: tensor.shape[0], : tensor.shape[1]]
        elif not is_scale(name):
            weights[name] = tensor.float()
    return weights


def load_model(folder: Path) -> torch.nn.Module:
    return import_transformers().AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_near_those_of_the_model_that_was_quantised(kind, folders, tmp_path):
    plain = folders["qwen2", "none"]
    save_file(dequantized(folders["qwen2", kind], kind), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((plain / "config.json").read_text())
    with torch.no_grad():
        ours, exact = (load_model(folder)(torch.arange(3, 60)[None]).logits for folder in (tmp_path, plain))
    assert ((ours - exact).norm() / exact.norm()).item() < 0.15


def test_transformers_reads_the_weights_that_we_mean(folders):
    """The format has a scale for each row; for blocks transformers needs a package that this project lacks."""
    pytest.importorskip("compressed_tensors")
    model = load_model(folders["qwen2", "fp8_channel"])
    with torch.no_grad():
        model(torch.tensor([[3]]))  # the first forward pass restores the weights
    loaded = model.state_dict()
    for name, weight in dequantized(folders["qwen2", "fp8_channel"], "fp8_channel").items():
        torch.testing.assert_close(loaded[name], weight, rtol=2**-8, atol=0)  # it multiplies in bf16


CHECK = """
from megatron_dypo.rollout.server import sglang_cpu
import json, sys
from sglang.srt.layers.quantization import get_quantization_config
for folder in sys.argv[1:]:
    config = json.load(open(folder + "/config.json"))["quantization_config"]
    read = get_quantization_config(config["quant_method"]).from_config(config)
    print(type(read).__name__, getattr(read, "weight_block_size", None), len(getattr(read, "target_scheme_map", "")))
"""


def test_sglang_knows_the_configurations(folders):
    pytest.importorskip("sglang")
    paths = [str(folders[model, kind]) for model in MODELS for kind in KINDS]
    run = subprocess.run([sys.executable, "-c", CHECK, *paths], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["Fp8Config [128, 128] 0", "CompressedTensorsConfig None 1"] * len(MODELS)


def test_a_quantised_folder_is_not_trained_or_converted(folders, tmp_path):
    for kind in KINDS:
        with pytest.raises(ValueError, match=r"weight_scale\w*: is a scale of quantised weights"):
            quantize_hf(folders["qwen2", kind], tmp_path / "again", "fp8_block", show_progress=False)
    assert not list(tmp_path.iterdir())


def test_a_model_in_fp8_is_half_as_large_as_in_bf16(tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 2}
    plain = make_hf_model("llama", tmp_path / "plain", dtype=torch.bfloat16, **sizes)
    quantize_hf(plain, tmp_path / "fp8", "fp8_block", show_progress=False)
    before, after = ((folder / "model.safetensors").stat().st_size for folder in (plain, tmp_path / "fp8"))
    print(f"{after / before:.4f} of the bytes")
    assert 0.5 < after / before < 0.52
