"""Attempts that begin at the same checkpoint and save no later one: slurm/requeue.sh without Slurm."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.slurm_job import Job

STARTED = """
sinfo() { echo "node1 alloc"; echo "node2 ${NODE2:-alloc}"; }
start_trainer() { count_start; }
squeue() { echo RUNNING; }
MAX_RESTARTS=3 GRACE_S=0 RUN_DIR=$LOG_ROOT/run TRAIN=(node1 node2) SPARE=()
reach() { mkdir -p "$RUN_DIR/checkpoints"; echo "$1" >"$RUN_DIR/checkpoints/latest_checkpointed_iteration.txt"; }
"""
LOST = "77 12 rank_lost: rank 3 was killed by SIGKILL"
ENDS = {
    "the save takes longer than GRACE_S": (
        "",
        "tail --pid=$$ -f /dev/null >/dev/null 2>&1 & PID[trainer]=$!; STOP_AT=0; supervise",
    ),
    "a rank is killed while it saves": (LOST, "STOP_AT=5; restart_trainer 77 'trainer ended'"),
    "a node is lost and there is no spare": (
        "77 0 rank_lost: Connection closed by peer",
        "NODE2='down*'; restart_trainer 143 'trainer ended'",
    ),
}
STUCK = "dypo: error: 3 attempts in a row began at the same checkpoint (30) in "


def attempt(job: Job, number: int, line: str, script: str, *, begins_at: int = 30) -> tuple[int, str]:
    """Run the end of one attempt of a job, of which the trainer's node wrote ``line``."""
    logs = job.logs.with_name(f"12.{number}")
    for folder in ("ends", "ended", "bad", "well"):
        (logs / folder).mkdir(parents=True, exist_ok=True)
    if line:
        (logs / "ends" / "node1").write_text(line + "\n")
    return Job(logs=logs)(f"{STARTED}reach {begins_at}; start_trainer; {script}", ATTEMPT=str(number))


@pytest.mark.parametrize("name", ENDS)
def test_the_third_attempt_in_a_row_at_the_same_checkpoint_is_the_last(job: Job, name: str) -> None:
    line, script = ENDS[name]
    for number in (0, 1):
        code, said = attempt(job, number, line, script)
        assert (code, "scontrol requeue 12" in said) == (0, True), said
    code, said = attempt(job, 2, line, script)
    assert (code, "scontrol" in said) == (1, False), said
    assert f"{STUCK}{job.logs.parents[1]}/run/checkpoints, and none saved a later one: " in said
    assert "GRACE_S" in said


def test_an_attempt_that_gets_further_begins_a_new_row(job: Job) -> None:
    line, script = ENDS["a rank is killed while it saves"]
    for number, further in enumerate((False, False, True, False, False)):
        code, said = attempt(job, number, line, f"{'reach 60; ' * further}{script}")
        assert (code, "scontrol requeue 12" in said) == (0, True), said
    assert attempt(job, 5, line, script)[0] == 1


def test_another_first_checkpoint_begins_a_new_row(job: Job) -> None:
    line, script = ENDS["a rank is killed while it saves"]
    for number, begins_at in enumerate((30, 30, 60, 60)):
        assert attempt(job, number, line, script, begins_at=begins_at)[0] == 0


@pytest.mark.parametrize(
    ("line", "script"),
    [
        ("75 0 stopped: asked", "requeue again"),
        ("", 'touch "$DYPO_LOGS/stopped"; requeue again'),
        ("", "TRAINER_STARTS=0; requeue 'without node2' node2"),
    ],
    ids=["before its first step", "before it could hear the request", "before the roles"],
)
def test_attempts_that_are_told_to_stop_while_they_start_do_not_count(job: Job, line: str, script: str) -> None:
    for number in range(5):
        assert attempt(job, number, line, script)[0] == 0
    lost, ends = ENDS["a rank is killed while it saves"]
    codes = [attempt(job, number, *((lost, ends) if number % 2 else (line, script)))[0] for number in range(5, 10)]
    assert codes == [0, 0, 0, 0, 1], "they do not break a row either"


def test_a_first_step_that_does_not_end_within_the_grace_time_counts(job: Job) -> None:
    """Slurm's SIGTERM then ends the trainer, which says that it made no step."""
    script = ENDS["the save takes longer than GRACE_S"][1]
    ended = "stop_roles() { echo '143 0 terminated: asked' >$DYPO_LOGS/ends/node1; touch $DYPO_LOGS/stopped; }; "
    codes = [attempt(job, number, "", ended + script)[0] for number in range(3)]
    assert codes == [0, 0, 1]


def test_a_run_without_a_checkpoint_is_told_so(job: Job, tmp_path: Path) -> None:
    line, script = ENDS["a rank is killed while it saves"]
    for number in range(3):
        code, said = attempt(job, number, line, f"FIRST_CHECKPOINT=''; got_further() {{ false; }}; {script}")
    assert code == 1
    assert "began at the same checkpoint (none yet) in " in said
