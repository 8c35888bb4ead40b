"""`megatron-dypo plan`, as a user calls it."""

import json
import os
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from megatron_dypo.cli import app
from tests.support.planning_cases import ROOT

PAPER = (
    "examples/qwen2_5_math_7b/dypo.yaml",
    "model.hf_path=tests/planning_configs/qwen2_5_math_7b",
    "rollout.servers.urls=[]",
    "rollout.servers.per_node=8",
    "--gpu=a800-80gb",
)
GOLDEN = ROOT / "tests" / "golden" / "plan_llama3_70b.txt"
REGENERATE = "python -m megatron_dypo.cli plan tests/planning_configs/llama3_70b.yaml"
"""The command whose output is the golden file."""


@pytest.fixture
def plan(monkeypatch):
    monkeypatch.chdir(ROOT)
    return lambda *arguments: CliRunner().invoke(app, ["plan", *arguments])


@pytest.mark.parametrize(
    "arguments",
    [PAPER, ("tests/planning_configs/llama3_70b.yaml",), ("tests/planning_configs/qwen3_235b_a22b.yaml",)],
    ids=["paper 7B", "llama3 70B", "qwen3 235B"],
)
def test_known_settings_fit_and_are_planned_in_seconds(plan, arguments):
    start = time.process_time()
    done = plan(*arguments)
    assert done.exit_code == 0
    assert "\nFITS. Tightest: " in done.stdout
    assert time.process_time() - start < 15


def test_a_plan_takes_less_than_15_seconds_of_one_core_all_imports_in():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    before = os.times()
    subprocess.run([sys.executable, "-m", "megatron_dypo.cli", "plan", *PAPER], cwd=ROOT, env=environment, check=True)
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 15


def test_what_does_not_fit_is_exit_code_1_and_the_term_that_is_too_large(plan):
    done = plan("tests/planning_configs/too_large.yaml")
    assert done.exit_code == 1
    last = done.stdout.rstrip().splitlines()[-1]
    assert last.startswith("DOES NOT FIT: trainer: ")
    assert "the largest term is optimizer with 98.6 GiB" in last
    assert "optimizer.distributed=true" in last


def test_the_plan_of_llama3_70b_is_the_golden_one(plan):
    assert plan("tests/planning_configs/llama3_70b.yaml").stdout == GOLDEN.read_text(), f"{REGENERATE} > {GOLDEN}"


def test_json_holds_the_terms_in_bytes(plan):
    done = plan("tests/planning_configs/llama3_70b.yaml", "--json", "--nodes", "16", "--response-tokens", "1000")
    told = json.loads(done.stdout)
    assert told["fits"]
    assert told["trainer_gpus"] == 128
    assert told["memory_bytes"][0]["terms"]["parameters"] == pytest.approx(70.55e9 * 2 / 32, rel=0.05)
    assert told["step"]["total_s"] > told["step"]["overlapped_s"] > 0


def test_an_unknown_gpu_is_refused_with_the_known_ones(plan):
    done = plan("tests/planning_configs/llama3_70b.yaml", "--gpu", "h1000")
    assert isinstance(done.exception, ValueError)
    assert str(done.exception).startswith("gpu='h1000': must be one of a100-40gb,")


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "--nodes=0"),
        ("plan", "--gpus-per-node=0"),
        ("plan", "--prompt-tokens=-5"),
        ("plan", "--response-tokens=0"),
        ("plan-refit", "--world-size=0"),
        ("plan-refit", "--ep-size=0"),
    ],
    ids=" ".join,
)
def test_an_option_that_counts_nothing_is_refused_by_its_name(arguments):
    command, option = arguments
    done = CliRunner().invoke(app, [command, "tests/planning_configs/llama3_70b.yaml", option])
    assert done.exit_code == 2
    assert option.partition("=")[0] in done.output
