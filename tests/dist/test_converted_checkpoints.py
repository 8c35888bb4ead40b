"""Converted checkpoints in the trainer, trained checkpoints in the converter, exports from running ranks."""

from __future__ import annotations

import filecmp
import queue
from pathlib import Path

import pytest
import torch

from megatron_dypo.mcore.checkpoints.convert import hf_to_mcore, mcore_to_hf
from megatron_dypo.parallel.mesh import Mesh
from tests.support.dist.spawn import run_ranks
from tests.support.hf_models import KINDS, make_hf_model
from tests.support.slow import slow_unless

LAYOUTS = {
    "one": (1, {}, (2, 2)),
    "tp2": (2, {"tensor": 2}, (1, 1)),
    "vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}, (4, 1)),
    "tp2_pp2_3_1": (4, {"tensor": 2, "pipeline": 2, "first_stage_layers": 3}, (1, 2)),
    "dp2": (2, {"pipeline": 1}, (4, 4)),
    "ep2": (2, {"expert": 2}, (2, 2)),
    "ep2_etp2": (4, {"expert": 2, "expert_tensor": 2}, (2, 1)),
    "tp2_sp_etp2": (2, {"tensor": 2, "sequence": True, "expert_tensor": 2}, (2, 2)),
    "tp2_sp_ep2_pp2": (4, {"tensor": 2, "sequence": True, "expert": 2, "pipeline": 2}, (1, 1)),
}
"""Number of ranks, their axes, and the TP × PP for which the converted checkpoint was written."""
IN_EVERY_RUN = {"one", "tp2_pp2_3_1", "dp2", "ep2_etp2", "tp2_sp_ep2_pp2"}
"""Layouts that are not left to the slow tests."""


def kinds_of(axes: dict) -> list[str]:
    """Return the kinds of models of a layout.

    Layouts that spread or split experts get mixtures of experts. Others get dense models: all kinds on one rank and in
    the layout that has every axis; elsewhere one of each combination of tied embeddings, biases and norms."""
    if {"expert", "expert_tensor"} & axes.keys():
        split = "expert_tensor" in axes
        return ["qwen3_moe", *(("moonlight", "glm4_air") if split else ("deepseek_v3", "glm4_moe", "gpt_oss"))]
    return list(KINDS) if not axes or "first_stage_layers" in axes else ["llama_tied", "qwen2", "qwen3"]


def rank_task(root: str, axes: dict) -> dict[str, list[str]]:
    """Load every model from HF and from the converted checkpoint, then save and export it.

    Returns:
        Model → parameters that differ between the two, or that loading left unchanged.
    """
    from megatron_dypo.config.model import ParallelConfig
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.parallel.groups import close

    parallel = ParallelConfig(**axes)
    layout = start_megatron(parallel)
    wrong = {kind: _one_model(Path(root), kind, parallel, layout) for kind in kinds_of(axes)}
    torch.distributed.barrier()
    close(layout)
    return wrong


def _one_model(root: Path, kind: str, parallel, layout) -> list[str]:
    from megatron_dypo.mcore.chunks import named_global_weights
    from megatron_dypo.models.architecture import load_architecture

    hf = root / "hf" / kind
    arch = load_architecture(hf)
    chunks = _load(hf, None, arch, parallel, layout)
    converted = dict(named_global_weights(_load(hf, root / "mcore" / kind, arch, parallel, layout)))
    named = dict(named_global_weights(chunks))
    assert named.keys() == converted.keys()
    _save(chunks, root / "trained" / kind / "mcore", layout)
    for _ in range(2):  # the second save replaces the first
        _export(named, arch, layout, root / "exports" / kind, hf)
    return [name for name in named if not torch.equal(named[name], converted[name]) or (named[name] == -1).any()]


def _load(hf: Path, mcore: Path | None, arch, parallel, layout) -> list:
    from megatron_dypo.config.model import ModelConfig
    from megatron_dypo.mcore.model import build_model, load_initial_weights

    model = ModelConfig(hf_path=str(hf), mcore_path=None if mcore is None else str(mcore), dtype="float32")
    chunks = build_model(arch, model, parallel, layout)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(-1.0)
    load_initial_weights(chunks, model, arch, layout)
    return chunks


def _save(chunks: list, folder: Path, layout) -> None:
    """Save as a run does, with some optimizer state in addition to the weights."""
    from megatron.core import dist_checkpointing

    from megatron_dypo.mcore.checkpoints.weights import model_state
    from megatron_dypo.mcore.compat.results_queue import use_results_queue

    state = model_state(chunks)
    key = "optimizer.state.exp_avg.decoder.final_layernorm.weight"
    replica_id = (0, 0, torch.distributed.get_rank())
    state["moment"] = dist_checkpointing.ShardedTensor.from_rank_offsets(key, torch.ones(3), replica_id=replica_id)
    use_results_queue(queue.SimpleQueue())
    dist_checkpointing.save(state, str(folder))


def _export(named: dict, arch, layout, out_dir: Path, hf: Path) -> None:
    from megatron_dypo.models.export import export_hf

    export_hf(
        named.items(),
        arch,
        layout,
        out_dir=out_dir,
        reference_hf_path=hf,
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for kind in (*KINDS, "qwen3_moe", "deepseek_v3", "moonlight", "glm4_moe", "glm4_air", "gpt_oss"):
        make_hf_model(kind, root / "hf" / kind)
    return root / "hf"


@pytest.fixture(scope="module", params=slow_unless(IN_EVERY_RUN.__contains__, LAYOUTS))
def ran(
    request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict, list[dict[str, list[str]]]]:
    """Run the ranks of one layout; give the folder of their files, the axes, and the errors that each rank found."""
    world_size, axes, (tp, pp) = LAYOUTS[request.param]
    root = tmp_path_factory.mktemp(request.param)
    (root / "hf").symlink_to(models)
    for kind in kinds_of(axes):
        hf_to_mcore(root / "hf" / kind, root / "mcore" / kind, mesh=Mesh(tensor=tp, pipeline=pp))
        (root / "trained" / kind / "mcore").mkdir(parents=True)
    return root, axes, run_ranks(world_size, rank_task, str(root), axes)


def test_a_converted_checkpoint_loads_as_the_hf_folder_does(ran) -> None:
    _, axes, wrong_by_rank = ran
    assert wrong_by_rank == [{kind: [] for kind in kinds_of(axes)}] * len(wrong_by_rank)


def test_a_trained_checkpoint_converts_to_what_it_was_loaded_from(ran, tmp_path) -> None:
    root, axes, _ = ran
    for kind in kinds_of(axes):
        hf = root / "hf" / kind
        mcore_to_hf(root / "trained" / kind, tmp_path / kind, hf_reference=hf, show_progress=False)
        assert_same_folder(hf, tmp_path / kind)


def test_an_export_holds_the_weights_that_were_loaded(ran) -> None:
    from safetensors.torch import load_file

    root, axes, _ = ran
    assert sorted(entry.name for entry in (root / "exports").iterdir()) == sorted(kinds_of(axes))
    for kind in kinds_of(axes):
        out = root / "exports" / kind
        files = sorted(file.name for file in out.glob("*.safetensors"))
        assert len(files) == axes.get("pipeline", 1) * num_owners(kind, axes)
        loaded = {name: tensor for file in files for name, tensor in load_file(out / file).items()}
        expected = load_file(root / "hf" / kind / "model.safetensors")
        assert loaded.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(loaded[name], tensor), name
        if len(files) == 1:
            assert_same_folder(root / "hf" / kind, out)


def test_every_stage_and_every_owner_of_experts_writes_its_own_files(ran) -> None:
    from safetensors import safe_open

    root, axes, _ = ran
    stages = axes.get("pipeline", 1)
    for kind in kinds_of(axes):
        owners = num_owners(kind, axes)
        writers: dict[tuple[int, int], set[str]] = {}
        for file in (root / "exports" / kind).glob("*.safetensors"):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118, a safetensors handle is no mapping
                    writers.setdefault(writer_of(name, axes, NUM_EXPERTS[kind], owners), set()).add(file.name)
        assert len(writers) == stages * owners
        assert all(len(files) == 1 for files in writers.values()), writers
        assert len(set.union(*writers.values())) == len(writers)


NUM_EXPERTS = {
    **dict.fromkeys(KINDS, 1),
    **dict.fromkeys(("qwen3_moe", "gpt_oss"), 4),
    **dict.fromkeys(("deepseek_v3", "moonlight", "glm4_moe", "glm4_air"), 8),
}


def num_owners(kind: str, axes: dict) -> int:
    """Return how many ranks of a stage write experts. One writes a stack of them."""
    return 1 if kind == "gpt_oss" else int(axes.get("expert", 1))


def writer_of(name: str, axes: dict, experts: int, owners: int) -> tuple[int, int]:
    """Return the pipeline stage and expert rank that write a tensor of a model with four layers."""
    stages = axes.get("pipeline", 1)
    parts = name.split(".")
    if parts[1] != "layers":
        return 0 if parts[1] == "embed_tokens" else stages - 1, 0
    chunks = stages * axes.get("virtual_pipeline", 1)
    layer, in_first = int(parts[2]), axes.get("first_stage_layers")
    stage = layer * chunks // 4 % stages if in_first is None else int(layer >= in_first)
    return stage, int(parts[5]) * owners // experts if parts[4] == "experts" and owners > 1 else 0


def assert_same_folder(expected: Path, actual: Path) -> None:
    names = sorted(file.name for file in expected.iterdir())
    assert sorted(file.name for file in actual.iterdir()) == names
    assert filecmp.cmpfiles(expected, actual, names, shallow=False) == (names, [], [])
