"""The benchmarks run, at sizes that say nothing; what they measure is in benchmarks/results."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def last_line(script, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment, timeout=300).stdout
    return json.loads(output.splitlines()[-1])


def test_packing_compares_plans():
    result = last_line("packing.py", "--sequences", "64", "--draws", "1", "--budgets", "16384", "--many", "500")
    assert set(result) == {"padding_share", "flops_imbalance"}
    assert 0 <= result["padding_share"] <= 0.02


@pytest.fixture(scope="module")
def shape():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from step_overhead import Shape

    sys.path.remove(str(ROOT / "benchmarks"))
    tiny = Shape(hidden=128, layers=2, ffn=64, vocab=500, rollouts=4, traces=1, group_size=2, length=16)
    return json.dumps(dataclasses.asdict(tiny))


def test_updates_are_timed_in_turn(shape):
    result = last_line("step_overhead.py", "--measure", "time", "--shape", shape, "--rounds", "2")
    assert {name: len(values) for name, values in result["wall"].items()} == {"dypo": 2, "sft": 2, "sft_unfused": 2}
    assert min(result["scoring"], *result["wall"]["dypo"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["dypo", "sft"])
def test_peak_memory_holds_parameters_gradients_and_moments(shape, variant):
    result = last_line("step_overhead.py", "--measure", f"memory:{variant}", "--shape", shape)
    parameters = 2 * 500 * 128
    assert result["total"] > 4 * 4 * parameters
    assert result["total"] >= result["step"] > 0
