"""A refit from ranks with replicas and interleaved stages: each tensor is written once, and an error of one rank is an
error of all."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.dist.spawn import run_ranks
from tests.support.fake_control import KEY, fake_servers
from tests.support.hf_models import make_hf_model

CASES = {
    "interleaved": ("qwen2", {"pipeline": 2, "virtual_pipeline": 2}),
    "experts over replicas": ("qwen3_moe", {"pipeline": 2, "first_stage_layers": 1, "expert": 2}),
    "experts split over replicas": ("qwen3_moe", {"pipeline": 2, "expert_tensor": 2}),
    "experts spread and split": ("qwen3_moe", {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 2}),
}
WORLD_SIZE = 4  # two replicas


def rank_refit(
    model: str, axes: dict[str, Any], urls: list[str], run_dir: str, misshapen_on: int | None
) -> tuple[tuple[str, int], list[list[str]]]:
    """Refit by disk; return (error, bytes), and the tensors that leave this rank in each turn of a broadcast."""
    from megatron_dypo.config.model import ModelConfig, ParallelConfig
    from megatron_dypo.config.refit import RefitConfig
    from megatron_dypo.mcore.chunks import named_global_parameters
    from megatron_dypo.mcore.model import build_model, load_initial_weights
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.models.architecture import load_architecture
    from megatron_dypo.parallel.groups import close
    from megatron_dypo.refit.lockstep import RefitError
    from megatron_dypo.refit.refitter import Refitter
    from megatron_dypo.refit.source import Source

    parallel = ParallelConfig(**axes)
    layout = start_megatron(parallel)
    arch, config = load_architecture(model), ModelConfig(hf_path=model, dtype="float32")
    chunks = build_model(arch, config, parallel, layout)
    load_initial_weights(chunks, config, arch, layout)

    def params():
        for name, parameter in named_global_parameters(chunks):
            yield name, parameter[:1] if layout.rank == misshapen_on else parameter

    refitter = Refitter(
        layout,
        arch,
        params,
        urls=urls,
        api_key=KEY,
        config=RefitConfig(transport="disk", deadline_s=60.0),
        run_dir=Path(run_dir),
        hf_reference=Path(model),
    )
    try:
        result = "", refitter.refit(1).bytes
    except RefitError as error:
        result = str(error), 0
    refitter.close()
    source = Source(layout=layout, arch=arch, named_params=lambda: named_global_parameters(chunks))
    by_turn = [[name for name, _ in source.tensors(turn)] if source.joins(turn) else [] for turn in source.turns]
    close(layout)
    return result, by_turn


@pytest.mark.parametrize("case", CASES)
def test_each_tensor_is_written_and_broadcast_once(case, tmp_path):
    kind, axes = CASES[case]
    model = make_hf_model(kind, tmp_path / "hf")
    with fake_servers(2, model_type=kind, model_path=str(model)) as servers:
        urls = [server.url for server in servers]
        results = run_ranks(WORLD_SIZE, rank_refit, str(model), axes, urls, str(tmp_path), None)
        assert [server.version for server in servers] == ["1", "1"]
    expected = load_file(model / "model.safetensors")
    written: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "refit" / "version_1").glob("*.safetensors"):
        tensors = load_file(file)
        assert not written.keys() & tensors.keys()
        written.update(tensors)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    outcome = "", sum(4 * tensor.numel() for tensor in expected.values())
    assert [result for result, _ in results] == [outcome] * WORLD_SIZE
    turns = list(zip(*(by_turn for _, by_turn in results), strict=True))
    assert all(sum(map(bool, by_rank)) == 1 for by_rank in turns), "one rank sends in a turn"
    assert sorted(itertools.chain(*itertools.chain(*turns))) == sorted(expected)


def test_what_one_rank_finds_wrong_is_raised_on_all(tmp_path):
    model = make_hf_model("qwen2", tmp_path / "hf")
    stage_1_of_first_replica = 2
    with fake_servers(1, model_type="qwen2", model_path=str(model)) as servers:
        results = run_ranks(
            WORLD_SIZE,
            rank_refit,
            str(model),
            CASES["interleaved"][1],
            [servers[0].url],
            str(tmp_path),
            stage_1_of_first_replica,
        )
        assert "/pause_generation" not in servers[0].posts
    assert len({outcome for outcome, _ in results}) == 1
    assert results[0][0][0].startswith(f"rank {stage_1_of_first_replica}: decoder.layers.1.")


def rank_that_may_be_late(model: str, late_s: float, deadline_s: float) -> bool:
    from megatron_dypo.config.model import ParallelConfig
    from megatron_dypo.config.refit import RefitConfig
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.models.architecture import load_architecture
    from megatron_dypo.parallel.groups import close
    from megatron_dypo.refit import refitter as module

    layout = start_megatron(ParallelConfig())
    vars(module)["RECOVERY_S"] = 0.0
    if layout.rank == 0:
        time.sleep(late_s)
    refitter = module.Refitter(
        layout,
        load_architecture(model),
        lambda: (),
        urls=["http://127.0.0.1:1"],
        api_key=KEY,
        config=RefitConfig(transport="disk", deadline_s=deadline_s),
        run_dir=Path(model),
        hf_reference=Path(model),
    )
    refitter.close()
    close(layout)
    return True


def test_a_rank_may_come_later_than_a_refits_deadline(tmp_path):
    """Rank 0 may wait minutes for servers before it makes its refitter. A refit's deadline begins with the refit."""
    model = make_hf_model("qwen2", tmp_path / "hf")
    assert run_ranks(2, rank_that_may_be_late, str(model), 6.0, 2.0) == [True, True]
