"""The plan of a run whose servers are on the trainer's GPUs (``refit.offload_servers``)."""

import pytest
from typer.testing import CliRunner

from megatron_dypo.cli import app
from megatron_dypo.planning.plan import make_plan
from tests.support.planning_cases import ROOT, from_file

COLOCATED = (
    "refit.offload_servers=true",
    "rollout.servers.nodes=1",
    "rollout.servers.per_node=8",
    "rollout.servers.extra_args=[--enable-memory-saver]",
)


def test_no_gpu_is_counted_twice_and_none_can_be_divided():
    plan = make_plan(from_file("llama3_70b", *COLOCATED))
    assert plan.setting.gpus == plan.setting.trainer_gpus == 64
    assert plan.balanced is None
    assert plan.synchronous is None
    assert all(row.split is None or row.split.trainer_gpus <= row.gpus for row in plan.scaling)


def test_the_servers_memory_has_the_trainers_state_in_it():
    plan = make_plan(from_file("llama3_70b", *COLOCATED))
    alone = make_plan(from_file("llama3_70b"))
    assert plan.server["trainer"] > plan.stages[0]["optimizer"] + plan.stages[0]["parameters"]
    assert plan.server.total == pytest.approx(plan.setting.gpu.memory, rel=1e-6), "the cache takes what is left"
    assert plan.server["KV cache"] < alone.server["KV cache"]


def test_the_report_says_that_they_share(monkeypatch):
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, ["plan", "tests/planning_configs/llama3_70b.yaml", *COLOCATED])
    assert "  none: they share all GPUs" in done.stdout
    assert "servers on the trainer's GPUs sleep and wake" in done.stdout
    assert "idle: trainer" not in done.stdout
