"""NeMo-Run's local and Slurm executors, for real: servers and trainer of a tiny run as one experiment."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import psutil
import pytest

from megatron_dypo.metrics.records import read_metrics
from megatron_dypo.rollout.server.command import lease_port
from tests.slurm_host.host import Job, start_slurm
from tests.support.e2e.commands import DEADLINE_S
from tests.support.e2e.parity_task import write_task
from tests.support.nemo_run import PROGRAM, dypo, nemo_run_python


@pytest.fixture(scope="module")
def python() -> Path:
    return nemo_run_python()


def tiny(folder: Path) -> list[str]:
    """Make the recipe ``tiny`` with a model and data of its own: two pipeline stages, one server, two steps."""
    write_task(folder)
    return [
        "model=tiny",
        f"venv={sys.prefix}",
        f"model.run.dir={folder / 'run'}",
        "model.run.steps=2",
        f"model.model.hf_path={folder / 'model'}",
        f"model.data.prompts=[{folder / 'train.jsonl'}]",
        "model.rollout.prompts_per_round=8",
        "model.rollout.max_new_tokens=12",
        "model.grading.verifier=tests.support.e2e.parity_task:verify",
        "model.batching.prompts_per_update=8",
        "model.optimizer.warmup_steps=0",
        "model.eval.sets={}",
    ]


def assert_trained(run_dir: Path) -> None:
    records = {record["step"]: record for record in read_metrics(run_dir / "metrics.jsonl")}
    assert sorted(step for step in records if step) == [1, 2]
    assert all(records[step]["rollout/policy_version"] == step - 1 for step in (1, 2))
    assert list((run_dir / "hf").glob("*.safetensors"))


def command_lines_with(text: str) -> list[list[str]]:
    """Return command lines of running processes that contain a text. A process that ends in the meantime has none."""
    found = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
    return [words for words in found if any(text in word for word in words)]


def test_the_local_executor_trains_with_servers_and_both_tasks_end_well(python, tmp_path):
    lease = lease_port("127.0.0.1", 31500)
    lease.release()
    arguments = [*tiny(tmp_path), f"model.rollout.servers.port={lease.port}"]
    done = dypo(python, tmp_path / "nemo_home", *arguments, deadline_s=DEADLINE_S)
    assert done.returncode == 0, done.stdout
    assert_trained(tmp_path / "run")
    endings = [json.loads(path.read_text()) for path in (tmp_path / "nemo_home").rglob("SUCCESS")]
    assert [ending["final_state"] for ending in endings] == ["SUCCEEDED", "SUCCEEDED"], done.stdout
    assert [task["exitcode"] for ending in endings for role in ending["roles"].values() for task in role] == [0, 0]
    assert command_lines_with(str(tmp_path)) == []


def test_a_trainer_that_fails_fails_the_local_experiment(python, tmp_path):
    done = dypo(python, tmp_path / "nemo_home", *tiny(tmp_path), "model.data.prompts=[/absent.jsonl]")
    assert done.returncode == 1, done.stdout
    assert "error: dypo: FAILED" in done.stdout
    logs = "".join(path.read_text() for path in (tmp_path / "nemo_home").rglob("stderr.log"))
    assert "data.prompts='/absent.jsonl': no such file" in logs
    assert command_lines_with(str(tmp_path)) == []


@pytest.mark.slow
def test_the_slurm_executor_trains_on_two_nodes_with_a_third_that_serves(python, tmp_path):
    host = start_slurm(nodes=3)
    try:
        home, logs = tmp_path / "nemo_home", tmp_path / "logs"
        where = ["run.executor=slurm", "run.executor.torchrun_nproc_per_node=1", "model.trainer_nodes=2"]
        call = [str(python), str(PROGRAM), "--detach", *where, *tiny(tmp_path)]
        settings = [f"NEMORUN_HOME={home}", f"LOG_ROOT={logs}", "COLUMNS=1000"]
        shown = host.call("env", *settings, *call)
        (number,) = re.findall(r"- Job id: (\d+)", shown)
        (folder,) = home.glob("experiments/dypo/*/dypo")
        name = "dypo-dypo.dypo-0"
        job = Job(host, number, folder / f"sbatch_{name}_{number}.out", logs / name)
        assert job.wait(DEADLINE_S) == "COMPLETED", job.everything()
        assert "job exited with code 0" in job.output()
        # The output does not name the key, and so does not show its value.
        assert "DYPO_SGLANG_API_KEY" not in job.output()
        assert_trained(tmp_path / "run")
        assert list((logs / name / f"{number}.0" / "rollout.node3").glob("sglang_*.log"))
        assert len(list((tmp_path / "run" / "logs").glob("rank_*.log"))) == 2
    finally:
        host.stop()
