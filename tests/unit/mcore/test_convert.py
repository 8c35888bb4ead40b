"""The converters: round trips, bad input, memory."""

from __future__ import annotations

import filecmp
import json
import multiprocessing as mp
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader

from megatron_dypo.mcore.checkpoints.convert import hf_to_mcore, mcore_to_hf
from megatron_dypo.mcore.checkpoints.manifest import MANIFEST
from megatron_dypo.parallel.mesh import Mesh
from tests.support.hf_models import KINDS, MOE_KINDS, import_transformers, make_hf_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hf")
    return {kind: make_hf_model(kind, root / kind, dtype=torch.bfloat16) for kind in (*KINDS, *MOE_KINDS)}


def convert(hf: Path, mcore: Path, tp: int = 1, pp: int = 1) -> None:
    hf_to_mcore(hf, mcore, mesh=Mesh(tensor=tp, pipeline=pp), show_progress=False)


def back(mcore: Path, hf: Path, **options) -> None:
    mcore_to_hf(mcore, hf, show_progress=False, **options)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 4)])
@pytest.mark.parametrize("kind", [*KINDS, *MOE_KINDS])
def test_a_round_trip_gives_back_every_byte(kind, tp, pp, models, tmp_path):
    convert(models[kind], tmp_path / "mcore", tp, pp)
    assert len(list((tmp_path / "mcore").glob("*.distcp"))) == tp * pp
    back(tmp_path / "mcore", tmp_path / "hf", tensor_parallel=tp, pipeline_parallel=pp)
    names = sorted(file.name for file in models[kind].iterdir())
    assert sorted(file.name for file in (tmp_path / "hf").iterdir()) == names
    assert filecmp.cmpfiles(models[kind], tmp_path / "hf", names, shallow=False) == (names, [], [])


def test_fp32_round_trip_through_files_cut_small(tmp_path):
    source = make_hf_model("qwen3", tmp_path / "source")
    convert(source, tmp_path / "mcore", 2, 2)
    back(tmp_path / "mcore", tmp_path / "hf", max_file_bytes=100_000)
    files = sorted(file.name for file in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    loaded = {name: tensor for file in files for name, tensor in load_file(tmp_path / "hf" / file).items()}
    original = load_file(source / "model.safetensors")
    assert loaded.keys() == original.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in original.items())
    tokens = torch.arange(3, 20)[None]
    auto = import_transformers().AutoModelForCausalLM
    with torch.no_grad():
        logits = [auto.from_pretrained(path)(tokens).logits for path in (source, tmp_path / "hf")]
    assert torch.equal(*logits)
    assert auto.from_pretrained(tmp_path / "hf").generation_config.eos_token_id == 2
    assert import_transformers().AutoTokenizer.from_pretrained(tmp_path / "hf").encode("t5 t7") == [5, 7]


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize(
    ("kind", "norms"),
    [
        ("llama", set()),
        ("qwen3", {"self_attention.q_layernorm", "self_attention.k_layernorm"}),
        ("qwen3_moe", {"self_attention.q_layernorm", "self_attention.k_layernorm", "pre_mlp_layernorm"}),
    ],
)
def test_each_norm_that_is_a_module_of_transformer_engine_has_a_state(kind, norms, pp, models, tmp_path):
    convert(models[kind], tmp_path / "mcore", pp=pp)
    keys = FileSystemReader(tmp_path / "mcore").read_metadata().state_dict_metadata.keys()
    found = {key for key in keys if "layernorm._extra_state" in key}
    in_layers = {f"decoder.layers.{norm}._extra_state/shard_{layer}_4" for norm in norms for layer in range(4)}
    assert found == in_layers | {"decoder.final_layernorm._extra_state/shard_0_1"}


def test_a_checkpoint_without_its_reference_needs_one(models, tmp_path):
    convert(models["qwen2"], tmp_path / "mcore")
    shutil.rmtree(tmp_path / "mcore" / "hf")
    with pytest.raises(ValueError, match="--hf-reference must name an HF folder"):
        back(tmp_path / "mcore", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    back(tmp_path / "mcore", tmp_path / "hf", hf_reference=models["qwen2"])
    assert filecmp.cmp(tmp_path / "hf" / "model.safetensors", models["qwen2"] / "model.safetensors", shallow=False)


def test_redundant_tensors_of_old_exports_are_passed_over(models, tmp_path):
    source = edited(models["llama_tied"], tmp_path, lambda weights: weights.update(redundant(weights)))
    convert(source, tmp_path / "mcore")
    back(tmp_path / "mcore", tmp_path / "hf")
    original = models["llama_tied"] / "model.safetensors"
    assert filecmp.cmp(tmp_path / "hf" / "model.safetensors", original, shallow=False)


def redundant(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    output = weights["model.embed_tokens.weight"].clone()
    return {"lm_head.weight": output, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}


def edited(source: Path, tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Copy an HF folder and edit its weights."""
    copy = shutil.copytree(source, tmp_path / "edited")
    weights = load_file(copy / "model.safetensors")
    edit(weights)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


O_PROJ = "model.layers.1.self_attn.o_proj.weight"

BAD_WEIGHTS = {
    "unmatched": (
        lambda w: w.update({"model.extra.weight": torch.ones(1)}),
        r"model\.extra\.weight: no rule of family",
    ),
    "missing": (lambda w: w.pop(O_PROJ), O_PROJ + " is missing"),
    "misshapen": (lambda w: w.update({O_PROJ: torch.ones(3, 2)}), O_PROJ + r" has shape \(3, 2\)"),
    "integer": (lambda w: w.update({O_PROJ: w[O_PROJ].int()}), O_PROJ + " has type I32"),
    "mixed": (lambda w: w.update({O_PROJ: w[O_PROJ].float()}), O_PROJ + r" is torch\.float32, others"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_a_bad_hf_tensor_is_named_and_nothing_is_written(case, models, tmp_path):
    edit, message = BAD_WEIGHTS[case]
    source = edited(models["qwen2"], tmp_path, edit)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "mcore")
    assert [entry.name for entry in tmp_path.iterdir()] == ["edited"]


BAD_CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "missing": ({"num_hidden_layers": 2}, {"num_hidden_layers": 4}, r"decoder\.\S+ has shape \(2, "),
    "unmatched": ({}, {"tie_word_embeddings": True}, r"tensor output_layer\.weight: no rule of family 'llama' matches"),
    "absent": (
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False},
        r"tensor output_layer\.weight is missing",
    ),
    "misshapen": ({}, {"intermediate_size": 100}, r"decoder\.layers\.mlp\.linear_fc2\.weight has shape \(4, 64, 96\)"),
    "vocabulary": ({}, {"vocab_size": 140}, r"embedding\.word_embeddings\.weight has shape \(131, 64\)"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_bad_mcore_tensor_is_named_and_nothing_is_written(case, tmp_path):
    sizes, claimed, message = BAD_CONFIGS[case]
    source = make_hf_model("llama", tmp_path / "source", **sizes)
    convert(source, tmp_path / "mcore")
    config = tmp_path / "mcore" / "hf" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | claimed))
    (tmp_path / "mcore" / MANIFEST).unlink()
    with pytest.raises(ValueError, match=message):
        back(tmp_path / "mcore", tmp_path / "hf")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["mcore", "source"]


def test_a_checkpoint_that_lacks_a_file_names_it(models, tmp_path):
    convert(models["llama"], tmp_path / "mcore", 2, 2)
    (tmp_path / "mcore" / "__2_0.distcp").unlink()
    with pytest.raises(ValueError, match=r"mcore/__2_0\.distcp: is missing"):
        back(tmp_path / "mcore", tmp_path / "hf")
    (tmp_path / "mcore" / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"file __2_0\.distcp, which holds \S+, is missing"):
        back(tmp_path / "mcore", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_each_stage_of_an_uneven_pipeline_has_a_file_with_its_layers(models, tmp_path):
    mesh = Mesh(pipeline=3, last_stage_layers=2)
    hf_to_mcore(models["llama"], tmp_path / "mcore", mesh=mesh, show_progress=False)
    stored = FileSystemReader(tmp_path / "mcore").read_metadata().storage_data
    file_of = {
        index.offset[0]: where.relative_path
        for index, where in stored.items()
        if index.fqn == "decoder.layers.mlp.linear_fc2.weight"
    }
    assert file_of == {0: "__0_0.distcp", 1: "__1_0.distcp", 2: "__2_0.distcp", 3: "__2_0.distcp"}


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no \.metadata file"):
        back(tmp_path, tmp_path / "hf")


@pytest.mark.parametrize(
    ("tp", "pp", "message"),
    [
        (3, 1, "tensor_parallel=3 does not divide num_attention_heads=8"),
        (8, 1, "tensor_parallel=8 does not divide num_key_value_heads=4"),
        (0, 1, "tensor=0: must be positive"),
        (1, 0, "pipeline=0: must be positive"),
        (1, 3, "parallel.pipeline=3 does not divide num_hidden_layers=4"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(tp, pp, message, models, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert(models["llama"], tmp_path / "mcore", tp, pp)
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_name_table_is_refused_in_one_line_both_ways(models, tmp_path):
    shutil.copytree(models["qwen2"], tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "mcore")
    for folder in (tmp_path / "hf", tmp_path / "mcore" / "hf"):
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, "model_type": "nemotron"}))
    (tmp_path / "mcore" / MANIFEST).unlink()
    for source, work in (("hf", convert), ("mcore", back)):
        with pytest.raises(ValueError, match=r"config\.json: model_type='nemotron': must be one of llama, ") as caught:
            work(tmp_path / source, tmp_path / "new")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "new").exists()


def test_what_is_there_is_never_overwritten(models, tmp_path):
    (tmp_path / "mcore").mkdir()
    (tmp_path / "mcore" / "precious").write_text("x")
    with pytest.raises(ValueError, match="is there already"):
        convert(models["llama"], tmp_path / "mcore")
    assert (tmp_path / "mcore" / "precious").read_text() == "x"
    shutil.rmtree(tmp_path / "mcore")
    convert(models["llama"], tmp_path / "mcore")
    with pytest.raises(ValueError, match="is there already"):
        back(tmp_path / "mcore", tmp_path / "mcore" / "hf")


def test_an_interrupted_write_leaves_nothing(models, tmp_path):
    damaged = tmp_path / "mcore"
    convert(models["llama"], damaged)
    file = damaged / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"__0_0\.distcp: has \d+ bytes, \d+ were written"):
        back(damaged, tmp_path / "hf")
    assert [entry.name for entry in tmp_path.iterdir()] == ["mcore"]


def _peak_bytes(direction: str, source: Path, target: Path) -> int:
    """Return the growth of anonymous memory while converting, that is, without file mappings."""
    baseline, peak, finished = _anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not finished.wait(0.001):
            peak = max(peak, _anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    convert(source, target, 2, 2) if direction == "mcore" else back(source, target)
    finished.set()
    watcher.join()
    return max(peak, _anonymous_bytes()) - baseline


def _anonymous_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_no_conversion_holds_more_than_a_few_tensors(tmp_path):
    sizes: dict[str, Any] = {"hidden_size": 256, "num_hidden_layers": 24, "intermediate_size": 1024, "vocab_size": 1024}
    source = make_hf_model("llama", tmp_path / "source", **sizes)
    model_bytes = (source / "model.safetensors").stat().st_size
    largest = 4 * 256 * 1024
    tiny = make_hf_model("llama", tmp_path / "tiny")
    with mp.get_context("spawn").Pool(1) as pool:
        # The first call imports modules. Its model is tiny: it leaves no freed memory to the calls that count.
        pool.apply(_peak_bytes, ("mcore", tiny, tmp_path / "tiny_mcore"))
        pool.apply(_peak_bytes, ("hf", tmp_path / "tiny_mcore", tmp_path / "tiny_hf"))
        to_mcore = pool.apply(_peak_bytes, ("mcore", source, tmp_path / "mcore"))
        to_hf = pool.apply(_peak_bytes, ("hf", tmp_path / "mcore", tmp_path / "hf"))
    print(f"model {model_bytes / 1e6:.1f} MB, peaks {to_mcore / 1e6:.1f} and {to_hf / 1e6:.1f} MB")
    assert model_bytes > 60 * largest
    assert max(to_mcore, to_hf) < 10 * largest
