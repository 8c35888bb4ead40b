"""Every kind of checkpoint that a run writes becomes the HF folder that the run would have exported at that step."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

import pytest

from megatron_dypo.mcore.checkpoints.convert import mcore_to_hf
from megatron_dypo.mcore.checkpoints.export_run import export_run
from tests.support.dist.spawn import run_ranks
from tests.support.dist.training import start
from tests.support.hf_models import make_hf_model
from tests.support.slow import slow_unless

CASES = {
    "one rank": ("qwen2", 1, {}, {}),
    "one rank, distributed optimizer": ("qwen3", 1, {}, {"distributed": True}),
    "one rank, bf16": ("qwen2", 1, {}, {"dtype": "bfloat16"}),
    "replicas, bf16, distributed optimizer": ("qwen2", 2, {}, {"dtype": "bfloat16", "distributed": True}),
    "tensor": ("llama", 2, {"tensor": 2, "sequence": True}, {}),
    "pipeline, tied embeddings": ("llama_tied", 2, {"pipeline": 2, "first_stage_layers": 3}, {"distributed": True}),
    "virtual pipeline": ("qwen2", 2, {"pipeline": 2, "virtual_pipeline": 2}, {}),
    "context": ("qwen3", 2, {"context": 2}, {"distributed": True}),
    "tensor and pipeline": ("mistral", 4, {"tensor": 2, "pipeline": 2}, {"distributed": True}),
    "experts": ("qwen3_moe", 4, {"pipeline": 2, "expert": 2}, {"distributed": True}),
    "latent attention": ("deepseek_v3", 4, {"pipeline": 2, "expert": 2}, {"distributed": True}),
    "experts behind a dense layer": ("glm4_moe", 4, {"pipeline": 2, "expert": 2}, {"distributed": True}),
    "stacked experts": ("gpt_oss", 4, {"pipeline": 2, "expert": 2}, {"distributed": True, "dtype": "bfloat16"}),
    "split experts": ("qwen3_moe", 4, {"expert": 2, "expert_tensor": 2}, {}),
    "tensor and experts": ("qwen3_moe", 4, {"tensor": 2, "sequence": True, "expert": 2, "pipeline": 2}, {}),
}
"""Model, ranks, axes and options of the run."""
QUICK = (
    "one rank, bf16",
    "pipeline, tied embeddings",
    "virtual pipeline",
    "experts",
)
"""Cases that are not left to the slow tests."""
STOP_IDS = (2, 7)
"""Ids at which the policy stops; generation_config.json of the model names the first one."""
SMALL = 60_000
"""Bytes of a file: so few that it holds only a few tensors."""


def rank_run(path: str, axes: dict, options: dict, run_dir: str) -> None:
    """Make two updates, and after each a checkpoint (the first weights are its reference policy) and an export."""
    from megatron_dypo.config.model import ParallelConfig
    from megatron_dypo.mcore.checkpoints import checkpoint
    from megatron_dypo.mcore.chunks import named_global_weights
    from megatron_dypo.mcore.reference import ReferencePolicy
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.models.export import export_hf
    from megatron_dypo.parallel.groups import close

    parallel = ParallelConfig(**axes)
    layout = start_megatron(parallel)
    session = start(path, layout, parallel, **options)
    reference = ReferencePolicy(session.chunks)

    def export(name: str, **options: Any) -> None:
        params = named_global_weights(session.chunks)
        out_dir = f"{run_dir}/expected/{name}"
        export_hf(params, session.arch, layout, out_dir=out_dir, reference_hf_path=path, stop_ids=STOP_IDS, **options)

    export("reference")
    for step in (1, 2):
        session.train(step, step)
        export(f"step_{step:06d}")
        checkpoint.begin_save(
            f"{run_dir}/checkpoints",
            step,
            chunks=session.chunks,
            optimizer=session.optimizer,
            layout=layout,
            trainer_state={},
            reference=reference,
            hf_path=path,
            stop_ids=STOP_IDS,
        ).finish()
    export("cut", max_file_bytes=SMALL)
    close(layout)


def assert_same_folder(expected: Path, actual: Path) -> None:
    names = sorted(file.name for file in expected.iterdir())
    assert sorted(file.name for file in actual.iterdir()) == names
    assert filecmp.cmpfiles(expected, actual, names, shallow=False) == (names, [], [])


@pytest.mark.parametrize("name", slow_unless(QUICK.__contains__, CASES))
def test_a_checkpoint_of_a_run_becomes_the_runs_own_export_byte_for_byte(name: str, tmp_path: Path) -> None:
    kind, world_size, axes, options = CASES[name]
    run_ranks(world_size, rank_run, str(make_hf_model(kind, tmp_path / "model")), axes, options, str(tmp_path))
    expected = tmp_path / "expected"
    first = export_run(tmp_path, step=1, show_progress=False)
    newest = export_run(tmp_path, out_dir=tmp_path / "newest", show_progress=False)
    assert first == tmp_path / "exports" / "step_000001"
    assert_same_folder(expected / "step_000001", first)
    assert_same_folder(expected / "step_000002", newest)
    weights, others = (next(folder.glob("*.safetensors")) for folder in (first, newest))
    assert not filecmp.cmp(weights, others, shallow=False)
    checkpoint = tmp_path / "checkpoints" / "step_000002"
    for source, converted in (
        (checkpoint, "step_000002"),
        (checkpoint / "mcore", "step_000002"),
        (checkpoint / "reference", "reference"),
    ):
        mcore_to_hf(source, tmp_path / "converted" / source.name, show_progress=False)
        assert_same_folder(expected / converted, tmp_path / "converted" / source.name)
    mcore_to_hf(checkpoint, tmp_path / "cut", max_file_bytes=SMALL, show_progress=False)
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 4
    assert_same_folder(expected / "cut", tmp_path / "cut")
