"""Whole training runs whose SGLang servers are killed: the run goes on, and no rollout is sampled by wrong weights."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dypo.metrics.records import read_metrics
from megatron_dypo.metrics.samples import read_samples
from tests.support.e2e.parity_task import write_task

REPOSITORY = Path(__file__).parents[2]
MAX_GAP = 1e-3
"""Largest mean |SGLang's log-prob − the trainer's| in fp32. The update of a step changes log-probs by more."""
UPDATES = {"p2p": "/update_weights_from_tensor", "broadcast": "/update_weights_from_distributed"}
"""Transport → the call that announces weights."""
EVENTS = (
    "generate",
    "/pause_generation",
    "/begin_weight_update",
    UPDATES["p2p"],
    "/end_weight_update",
    "/update_weight_version",
    "/continue_generation",
)


def run(
    folder: Path,
    moments: list[tuple[str, int, float]],
    transport: str,
    *,
    ranks: int,
    steps: int,
    count: int,
    deadline_s: float,
):
    """Return the log and the metrics of a run that must end well."""
    config = write_task(
        folder,
        run={"steps": steps},
        parallel={"pipeline": ranks},
        rollout={"servers": {"per_node": count, "port": 31000, "max_restarts": len(moments)}},
        refit={"transport": transport, "deadline_s": 800.0, "bucket_mib": 1},
        checkpoint={"every": 0},
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "tests.support.e2e.killing_run", str(config), json.dumps(moments)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=deadline_s)
    finally:
        process.terminate()
    assert process.returncode == 0, output[-8000:]
    log = (folder / "run/logs/rank_00000.log").read_text()
    return log, [record for record in read_metrics(folder / "run/metrics.jsonl") if record["step"] > 0]


def kills_behind_the_fence(log: str) -> int:
    """Count the kills that were requested while a refit probed whether the fenced server is well again.

    The server then stays fenced, which is not reported again, unless the kill comes so late that it has rejoined."""
    fenced: set[str] = set()
    count = 0
    for line in log.splitlines():
        if found := re.search(r"killing (http://\S+)", line):
            count += found[1] in fenced
        elif found := re.search(r"server (http://\S+) is fenced and ", line):
            fenced.add(found[1])
        elif found := re.search(r"server (http://\S+) answers again and rejoins by the refit", line):
            fenced.discard(found[1])
    return count


def check(folder: Path, log: str, metrics: list[dict], num_moments: int, steps: int) -> None:
    assert [record["step"] for record in metrics] == list(range(1, steps + 1))
    assert log.count("killing http") == num_moments
    assert len(re.findall(r"SGLang server \d .* ended with status 137; starting it again", log)) == num_moments
    assert log.count(" runs again;") == num_moments
    num_fenced = log.count(" is fenced and ")
    assert num_moments - kills_behind_the_fence(log) <= num_fenced <= num_moments
    assert log.count(" rejoins by the refit") == num_fenced
    assert sum(record["refit/fenced"] for record in metrics) == num_fenced
    assert sum(record["refit/rejoined"] for record in metrics) == num_fenced
    for row in read_samples(folder / "run"):
        assert {rollout["policy_version"] for rollout in row["rollouts"]} == {row["step"] - 1}
    for record in metrics:
        assert record["train/train_rollout_logprob_abs_diff"] <= MAX_GAP, record["step"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_goes_on_when_a_server_is_killed_before_during_and_after_a_refit(tmp_path):
    moments = [("generate", 0, 0.0), (UPDATES["p2p"], 1, 0.0), ("/continue_generation", 0, 0.0)]
    log, metrics = run(tmp_path, moments, "p2p", ranks=2, steps=5, count=2, deadline_s=1100)
    check(tmp_path, log, metrics, 3, 5)
    assert sum(record["refit/retries"] for record in metrics) == 2
    assert all(record["refit/pause_s"] > 0 for record in metrics)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_whose_only_server_is_killed_waits_for_it_and_refits_again(tmp_path):
    moments = [("generate", 0, 0.0), (UPDATES["broadcast"], 0, 0.0)]
    log, metrics = run(tmp_path, moments, "broadcast", ranks=2, steps=4, count=1, deadline_s=1100)
    check(tmp_path, log, metrics, 2, 4)
    assert log.count("no server is reachable; ") == 1


@pytest.mark.slow
@pytest.mark.timeout(14400)
def test_a_run_goes_on_when_servers_are_killed_at_thirty_random_moments(tmp_path):
    draw = random.Random(4)
    moments = [(draw.choice(EVENTS), draw.randrange(2), draw.choice((0.0, draw.uniform(0, 0.5)))) for _ in range(30)]
    log, metrics = run(tmp_path, moments, "p2p", ranks=1, steps=70, count=2, deadline_s=14000)
    check(tmp_path, log, metrics, 30, 70)
