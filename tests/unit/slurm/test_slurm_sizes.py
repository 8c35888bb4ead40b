"""A config, a plan and a Slurm job have the same numbers of servers."""

import json
import os
import re
import subprocess
import sys

from typer.testing import CliRunner

from megatron_dypo.cli import app
from tests.golden.render_jobs import FOLDER, REPOSITORY

MODEL = "model.hf_path=tests/planning_configs/llama3_70b"


def render(script: str, *overrides: str, **environment: str) -> subprocess.CompletedProcess:
    path = f"{sys.prefix}/bin:{os.environ['PATH']}"
    environment = {"VENV": sys.prefix, "DRY_RUN": "1", "DYPO_HOME": str(REPOSITORY), "PATH": path, **environment}
    return subprocess.run(
        ["bash", str(REPOSITORY / "slurm" / script), *overrides],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


PLAN = ["plan", "examples/llama3_70b/config.yaml", MODEL, "--nodes", "8"]


def seconds_of_a_step(plan: str) -> float:
    (found,) = re.findall(r"synchronous .*: ([0-9.]+) s \(.*\) a step", plan)
    return float(found)


def test_the_plan_of_the_70b_example_is_that_of_its_job(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    done = CliRunner().invoke(app, PLAN)
    assert done.exit_code == 0, done.output
    assert "servers  4 nodes × 8 GPUs: 4 × TP 8" in done.stdout
    job = (FOLDER / "slurm_dypo_70b.txt").read_text()
    assert "rollout.servers.nodes=4" in job
    (urls,) = {line for line in job.splitlines() if "rollout.servers.urls=" in line and "http" in line}
    assert urls.count("http://") == 4
    fewer = CliRunner().invoke(app, [*PLAN, "rollout.servers.nodes=1"])
    assert seconds_of_a_step(done.stdout) < 0.8 * seconds_of_a_step(fewer.stdout), "one node of servers is another job"


def test_plan_refit_counts_the_same_servers(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    arguments = ["plan-refit", "examples/llama3_70b/config.yaml", MODEL, "rollout.servers.per_node=2", "--json"]
    done = CliRunner().invoke(app, [*arguments, "--world-size", "32"])
    assert done.exit_code == 0, done.output
    assert {row["server"] for row in json.loads(done.stdout)["received"]} == set(range(8))


def test_another_number_of_rollout_nodes_than_the_jobs_is_one_line():
    done = render("dypo_70b.sh", "rollout.servers.nodes=6")
    assert done.returncode == 1
    assert done.stderr == (
        "dypo: error: rollout.servers.nodes=6, but the job has ROLLOUT_NODES=4: "
        "leave the override out, or set ROLLOUT_NODES\n"
    )


def test_servers_of_the_run_itself_are_on_one_node():
    assert "rollout.servers.nodes=1 \\" in render("dypo_7b.sh", "rollout.servers.urls=[]", ROLLOUT_NODES="0").stdout
