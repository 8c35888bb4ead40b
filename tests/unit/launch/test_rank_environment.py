"""The variables of a rank, which CUDA and torch read when they are first used."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from megatron_dypo.parallel.environment import prepare_rank

PROGRAM = """
import json, os, sys
import torch
first = {}
def look():
    first.update(first or {"at the first question": dict(os.environ)})
    return sys.argv[1] == "gpu"
torch.cuda.is_available = look

import megatron_dypo.launch.attempt as attempt
attempt.run_rank = lambda config, work: work(config)
import megatron_dypo.mcore.features
megatron_dypo.mcore.features.shield_imports = lambda: None
from megatron_dypo.config.data import DataConfig
from megatron_dypo.config.model import ModelConfig
from megatron_dypo.config.run import RunConfig
from megatron_dypo.config.tree import Config
from megatron_dypo.launch.start import launch

def work(config):
    names = ("CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE")
    from megatron_dypo.parallel import device
    device.on_gpu()
    asked = first["at the first question"]
    compiles = "TORCH_COMPILE_DISABLE" not in os.environ
    print(json.dumps({**{name: asked.get(name) for name in names}, "compiles": compiles}))

config = Config(run=RunConfig(dir="run", steps=1), model=ModelConfig(hf_path="hf"), data=DataConfig(prompts=("a",)))
launch(config, ["train"], work)
"""
"""A rank of which the work only looks at the environment."""


def first_question(kind: str) -> dict[str, object]:
    hidden = {"CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE", "TORCH_COMPILE_DISABLE"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [sys.executable, "-c", PROGRAM, kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert lines, done.stderr
    found: dict[str, object] = json.loads(lines[0])
    return found


@pytest.mark.parametrize("kind", ["gpu", "cpu"])
def test_a_rank_has_its_variables_before_it_asks_for_a_gpu_and_compiles_on_one_alone(kind: str) -> None:
    assert first_question(kind) == {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "NCCL_CUMEM_ENABLE": "0",
        "NCCL_NVLS_ENABLE": "0",
        "compiles": kind == "gpu",
    }


def test_what_the_user_has_set_stays() -> None:
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "NCCL_CUMEM_ENABLE": "1"}
    prepare_rank(environment)
    assert environment["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    assert environment["NCCL_CUMEM_ENABLE"] == "1"
