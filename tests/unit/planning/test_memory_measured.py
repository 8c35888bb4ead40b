"""The memory model against the live tensors of real updates: ``benchmarks/memory_model.py``."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.planning_cases import ROOT

QUICK = ("bf16", "fp32, selective")
SLOW = (
    "fp32",
    "bf16, full",
    "bf16, qwen2, wide",
    "bf16, DP2, distributed optimizer",
    "bf16, TP2, SP",
    "bf16, PP2",
    "fp32, PP2, 2 chunks each",
    "fp32, experts, EP2",
    "bf16, latent attention",
    "fp32, latent attention, TP2, SP",
    "bf16, shared experts",
    "fp32, shared experts, TP2, SP",
    "bf16, gpt-oss",
    "fp32, gpt-oss, TP2, SP",
)


def errors(*cases):
    """Largest relative error of each part."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "memory_model.py"), "--cases", *cases]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment, timeout=500).stdout
    return json.loads(output.splitlines()[-1])


@pytest.mark.parametrize("cases", [QUICK, *(pytest.param((case,), marks=pytest.mark.slow) for case in SLOW)])
def test_every_part_of_the_model_is_within_10_percent_of_live_tensors(cases):
    found = errors(*cases)
    assert set(found) == {"parameters", "gradients", "optimizer", "activations", "peak"}
    assert max(found.values()) <= 0.10, found
