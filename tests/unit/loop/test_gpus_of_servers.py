"""The GPUs of the servers that a run starts beside its ranks."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from megatron_dypo.config.data import DataConfig
from megatron_dypo.config.model import ModelConfig
from megatron_dypo.config.refit import RefitConfig
from megatron_dypo.config.rollout import RolloutConfig, ServersConfig
from megatron_dypo.config.run import RunConfig
from megatron_dypo.config.tree import Config
from megatron_dypo.loop.setup.connect import first_gpu, start_in_background
from tests.support.recording_cuda import RecordingCuda


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> RecordingCuda:
    cuda = RecordingCuda()
    cuda.stand_in(monkeypatch)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    return cuda


def config(refit: RefitConfig | None = None, **servers: Any) -> Config:
    return Config(
        run=RunConfig(dir="run", steps=1),
        model=ModelConfig(hf_path="hf"),
        data=DataConfig(prompts=("train.jsonl",)),
        rollout=RolloutConfig(servers=ServersConfig(**servers)),
        refit=refit or RefitConfig(),
    )


def test_servers_take_the_gpus_after_those_of_the_ranks_unless_they_share_them(cuda: RecordingCuda) -> None:
    assert first_gpu(config(per_node=2, tensor_parallel=2)) == 4
    assert first_gpu(config(per_node=2, tensor_parallel=2, base_gpu=0)) == 0
    assert first_gpu(config(RefitConfig(offload_servers=True), per_node=4, tensor_parallel=2)) == 0


def test_servers_for_which_the_node_has_too_few_gpus_are_refused(cuda: RecordingCuda) -> None:
    with pytest.raises(ValueError, match="base_gpu=4 need 10 GPUs, this node has 8; set base_gpu=0"):
        first_gpu(config(per_node=3, tensor_parallel=2))
    assert first_gpu(config(urls=("http://node1:30000",), per_node=3, tensor_parallel=4)) == 4, "they are elsewhere"


def test_weights_that_servers_on_gpus_cannot_take_are_refused_before_one_starts(cuda: RecordingCuda) -> None:
    with contextlib.ExitStack() as stack, pytest.raises(ValueError, match=r"refit.quantize=fp8_channel: .*transposed"):
        start_in_background(config(RefitConfig(quantize="fp8_channel")), stack)
    assert not Path("run").exists()
