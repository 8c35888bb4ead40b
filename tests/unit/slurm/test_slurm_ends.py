"""The last line of a job, and the ends after which it is requeued: slurm/supervise.sh without Slurm."""

import os
import re
from pathlib import Path

import pytest

from megatron_dypo.ending import Cause

REPOSITORY = Path(__file__).parents[3]


def end(job, node, line, age=0):
    path = job.logs / "ends" / node
    path.write_text(line + "\n")
    os.utime(path, (t := path.stat().st_mtime - age, t))


def test_the_one_status_that_is_tried_again_is_the_one_whose_cause_says_so():
    again = {cause.status for cause in Cause if cause.requeue}
    (named,) = re.findall(r'if \[ "\$status" = (\d+) \]', (REPOSITORY / "slurm" / "node.sh").read_text())
    assert again == {int(named)}


def test_the_last_line_names_the_cause_and_where_it_began(job):
    end(job, "node1", "77 3 rank_lost: Connection closed by peer", age=5)
    end(job, "node2", "70 3 bug: rank 12 on node2: 'absent'")
    _, said = job('fail "$(trainer_end 137)"')  # of srun, which killed a node that waited for the others
    assert said == (
        f"dypo: error: trainer on node2 ended with status 70; see {job.logs}/trainer.node2.log: "
        "bug: rank 12 on node2: 'absent'\n"
    )


def test_where_all_lost_each_other_the_first_counts(job):
    end(job, "node1", "77 3 rank_lost: rank 3 was killed by SIGKILL", age=5)
    end(job, "node2", "77 3 rank_lost: Connection closed by peer")
    assert "trainer on node1 " in job("trainer_end 77")[1]


def test_without_a_word_of_the_launcher_the_log_is_quoted_past_what_victims_say(job):
    log = "[rank0]: Traceback (most recent call last):\n[rank0]: KeyError: 'absent'\n"
    (job.logs / "trainer.node1.log").write_text("SignalException: signal: 15\n" + log + "ChildFailedError: \n")
    assert job("trainer_end 1")[1].endswith("trainer.*.log: KeyError: 'absent'\n")


def test_a_role_that_failed_is_quoted_too(job):
    (job.logs / "rollout.node3.log").write_text("megatron-dypo: error: port 1 of node3 is taken\n")
    (job.logs / "ended" / "node3").write_text("65\n")
    script = 'ask_trainer_to_stop() { echo "$1"; }; notice_ended_servers'
    line = f"rollout on node3 ended with status 65; see {job.logs}/rollout.node3.log: megatron-dypo: error: port 1"
    assert job(script)[1].startswith(line)


@pytest.mark.parametrize(
    ("quoted", "said"),
    [
        (
            "usage: sglang\nRuntimeError: earlier\nerror: no --such flag; read\n  [--flag]\n",
            "error: no --such flag; read",
        ),
        ("usage: sglang\nKilled\n\n", "Killed"),
    ],
)
def test_a_reason_that_quotes_a_log_is_completed_by_its_last_error(job, quoted, said):
    (job.logs / "rollout.node3.log").write_text(f"ready\nmegatron-dypo: error: gone; last lines of a.log:\n{quoted}")
    assert job("quote_error rollout.node3") == (0, f": megatron-dypo: error: gone; last lines of a.log: {said}\n")


def test_a_log_without_a_reason_is_not_quoted(job):
    (job.logs / "rollout.node3.log").write_text("ready\nChildFailedError: \n")
    for node in ("node3", "node4"):
        assert job(f'quoted=$(quote_error rollout.{node}); echo "nothing:$quoted"') == (0, "nothing:\n")


def test_a_stopped_trainer_is_requeued(job):
    end(job, "node1", "75 4 stopped: asked")
    code, said = job("conclude")
    assert code == 0
    assert said.splitlines()[-1] == "scontrol requeue 12"


def test_a_cancelled_job_is_not_requeued(job):
    code, said = job("conclude", STATE="COMPLETING")
    assert code == 1
    assert said == "dypo: error: the job was cancelled; submit again to resume\n"


def test_two_attempts_in_a_row_without_a_step_are_enough(job):
    end(job, "node1", "75 0 stopped: asked")
    assert "scontrol requeue 12" in job("conclude")[1]
    earlier = job.logs.with_name("12.0") / "ends"
    earlier.mkdir(parents=True)
    (earlier / "node1").write_text("75 5 stopped: asked\n")
    assert "scontrol requeue 12" in job("conclude")[1]
    (earlier / "node1").write_text("75 0 stopped: asked\n")
    code, said = job("conclude")
    assert code == 1
    assert "two attempts in a row ended before they made a step" in said


@pytest.mark.parametrize(
    ("state", "answer"),
    [("RUNNING", "stop\n"), ("RUNNING\nPENDING", "stop\n"), (" ", "stop\n"), ("COMPLETING\nCOMPLETING", "")],
    ids=["running", "of two components", "Slurm does not answer", "cancelled"],
)
def test_a_termination_of_a_job_that_still_runs_asks_the_trainer_to_stop(job, state, answer):
    code, said = job(
        'squeue() { [ "$STATE" = " " ] || echo "$STATE"; }; terminated; echo ${WANTS_STOP:+stop}', STATE=state
    )
    assert said == answer
    assert code == (0 if answer else 143)


@pytest.mark.parametrize(("status", "before"), [("0", ":"), ("69", "STOP_AT=5"), ("69", "WANTS_STOP=asked")])
def test_servers_that_end_because_the_job_ends_are_no_failure(job, status, before):
    (job.logs / "ended" / "node3").write_text(status)
    script = (
        f'{before}; ask_trainer_to_stop() {{ echo "$1"; }}; notice_ended_servers; echo "failure: ${{FAILURE:-none}}"'
    )
    assert job(script)[1] == "failure: none\n"


def test_servers_that_were_told_to_end_ask_the_trainer_to_stop(job):
    (job.logs / "ended" / "node3").write_text("0")
    assert job('notice_ended_servers; echo "$WANTS_STOP"')[1] == "rollout on node3 was told to end\n"


def test_a_router_that_was_told_to_end_asks_the_trainer_to_stop(job):
    script = '(exit 0) & PID[router]=$!; role_ended router; echo "$WANTS_STOP, ${FAILURE:-no failure}"'
    assert job(script)[1] == "router was told to end, no failure\n"


@pytest.mark.parametrize(
    ("status", "before", "end"),
    [(0, ":", "conclude"), (77, ":", "restart"), (77, "STOP_AT=5", "conclude"), (77, "WANTS_STOP=asked", "conclude")],
)
def test_a_trainer_that_was_told_to_stop_because_another_node_failed_has_not_stopped_on_request(
    job, status, before, end
):
    (job.logs / "stopped").touch()
    script = (
        f"conclude() {{ echo conclude; }}; restart_trainer() {{ echo restart; }}; (exit {status}) & PID[trainer]=$!"
    )
    assert job(f"{script}; {before}; role_ended trainer")[1] == f"{end}\n"


ROLE = "trap 'echo srun was told; exit' TERM; while :; do sleep 0.1; done"


def test_roles_are_told_to_end_by_slurm_before_srun_is(job):
    script = f"""
source {REPOSITORY}/slurm/supervise.sh
await_roles() {{ sleep 0.5; }}
scancel() {{ echo "scancel $*"; }}
({ROLE}) & PID[rollout]=$!
stop_roles
stop_roles
"""
    assert job(script) == (0, "scancel --signal=TERM 12\nsrun was told\n")


PREFLIGHT = """
NODES=(node1 node2) TRAIN=(node1 node2) CONTAINER=(--container)
step() {
  [ "$*" = "preflight node1 node2 -- --container bash slurm/node.sh preflight" ] || echo "step $*"
  eval "${DURING:-:}"
  touch "$DYPO_LOGS/well/node1"; [ -z "${SECOND:-}" ] || echo "7 of 8 GPUs" >"$DYPO_LOGS/$SECOND/node2"; }
check_nodes && echo passed
"""


def test_a_node_that_says_nothing_is_not_well(job):
    code, said = job(PREFLIGHT, MARKS_S="0")
    assert code == 1
    assert "preflight: nothing was heard of node2 in " in said
    assert "LOG_ROOT must be on a file system that all nodes share" in said


def test_nodes_that_are_well_pass_and_bad_ones_are_left_out(job):
    assert job(PREFLIGHT, MARKS_S="0", SECOND="well") == (0, "passed\n")
    _, said = job(PREFLIGHT, MARKS_S="0", SECOND="bad")
    assert "dypo: bad node node2: 7 of 8 GPUs" in said
    assert "scontrol requeue 12" in said


@pytest.mark.parametrize(
    "during",
    [
        pytest.param("kill -USR1 $$; sleep 5", id="USR1", marks=pytest.mark.slow),
        pytest.param("kill -TERM $$; sleep 5", id="TERM"),
        pytest.param("exit 143", id="TERM to the step"),
    ],
)
def test_a_request_to_stop_during_the_preflight_requeues_and_the_second_in_a_row_fails(job, during):
    script = f"trap terminated TERM; {PREFLIGHT}"
    code, said = job(script, DURING=during)
    assert (code, said.splitlines()[-1]) == (0, "scontrol requeue 12"), said
    assert "nothing has started yet" in said
    job.logs.rename(job.logs.with_name("12.0"))
    for folder in ("ends", "bad", "well"):
        (job.logs / folder).mkdir(parents=True)
    code, said = job(script, DURING=during)
    assert code == 1
    assert "two attempts in a row ended before they made a step" in said


def test_a_job_that_was_cancelled_during_the_preflight_is_not_requeued(job):
    code, said = job(PREFLIGHT, DURING="exit 143", STATE="COMPLETING")
    assert code == 1
    assert said.endswith("dypo: error: the job was cancelled; submit again to resume\n")


STARTS_AGAIN = """
sinfo() { printf '%s\\n' ${SINFO:-}; }
start_trainer() { count_start; echo "start on ${TRAIN[*]}, spare: ${SPARE[*]}"; }
MAX_RESTARTS=2 RUN_DIR=$LOG_ROOT/run TRAIN=(node1 node2) SPARE=(${SPARE_LIST:-})
reach() { mkdir -p "$RUN_DIR/checkpoints"; echo "$1" >"$RUN_DIR/checkpoints/latest_checkpointed_iteration.txt"; }
start_trainer
"""


@pytest.mark.parametrize(
    ("ends", "status", "starts"),
    [
        (["77 3 rank_lost: rank 3 was killed by SIGKILL", "77 3 rank_lost: Connection closed by peer"], 77, True),
        (["76 3 rank_hung: rank 3", "143 ? terminated: asked"], 76, True),
        (["72 3 node_fault: Input/output error", "77 3 rank_lost: Connection closed by peer"], 72, True),
        ([], 137, True),  # launchers that were killed
        ([], 127, False),  # a command that is not there
        (["77 3 rank_lost: Connection closed by peer", "13 3 not_finite: weights"], 77, False),
        (["65 ? bad_input: a key"], 65, False),
        (["70 3 bug: 'absent'"], 70, False),
    ],
)
def test_a_trainer_starts_again_in_place_only_if_it_was_lost(job, ends, status, starts):
    for number, line in enumerate(ends):
        end(job, f"node{number + 1}", line)
    code, said = job(f"{STARTS_AGAIN}restart_trainer {status} 'how it ended'")
    assert said.count("start on node1 node2") == 1 + starts
    assert (code == 0) is starts
    assert ("dypo: error: how it ended" in said) is not starts
    if starts:
        assert "dypo: how it ended" in said
        assert sorted(path.name for path in (job.logs / "ends.1").iterdir()) == [
            f"node{n + 1}" for n in range(len(ends))
        ]


@pytest.mark.parametrize(
    ("servers", "trainer", "gets_further", "is_requeued"),
    [
        (69, "75 3 stopped: asked", True, True),
        (69, "69 3 servers_gone: no server is left", True, True),
        (69, "77 3 rank_lost: rank 3 was killed by SIGKILL", True, True),
        (69, "75 3 stopped: asked", False, False),
        (69, "13 3 not_finite: weights", True, False),
        (65, "75 3 stopped: asked", True, False),
    ],
)
def test_a_job_that_lost_its_servers_is_requeued_if_it_got_further(job, servers, trainer, gets_further, is_requeued):
    (job.logs / "ended" / "node3").write_text(f"{servers}\n")
    end(job, "node1", trainer)
    status = int(trainer.split()[0])
    stopped = 'touch "$DYPO_LOGS/stopped"; status=0' if status == 75 else f"status={status}"
    script = f"ask_trainer_to_stop() {{ :; }}; {'reach 5; ' * gets_further}notice_ended_servers; {stopped}"
    code, said = job(f'{STARTS_AGAIN}{script}; (exit "$status") & PID[trainer]=$!; role_ended trainer')
    assert ("scontrol requeue 12" in said) is is_requeued
    assert code == (0 if is_requeued else 1)
    last = f"rollout on node3 ended with status {servers}"
    assert any(line.startswith(f"dypo: {'' if is_requeued else 'error: '}{last}") for line in said.splitlines())


def test_a_node_that_lost_its_servers_in_two_attempts_in_a_row_is_left_out(job):
    (job.logs / "ended" / "node3").write_text("69\n")
    lose = "ask_trainer_to_stop() { :; }; reach 5; notice_ended_servers; conclude"
    earlier = job.logs.with_name("12.0")
    earlier.mkdir()
    for node in ("node4", "node3"):
        code, said = job(f"{STARTS_AGAIN}{lose}")
        assert code == 0
        assert "requeued to go on from the last checkpoint" in said
        assert "ExcNodeList" not in said
        (earlier / "lost_servers").write_text(f"{node}\n")
        (job.logs.parents[1] / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").unlink()
    code, said = job(f"{STARTS_AGAIN}{lose}")
    assert code == 0
    assert "requeued without node3" in said
    assert "ExcNodeList=node3" in said
    assert "node3 its servers were lost in two attempts" in (job.logs.parents[1] / "bad_nodes.txt").read_text()


def test_a_mark_of_servers_that_is_being_written_is_not_read(job):
    (job.logs / "ended" / "node3").touch()
    assert job("notice_ended_servers; echo ${FAILURE:-none}")[1] == "none\n"


@pytest.mark.parametrize(("status", "is_requeued"), [(1, True), (137, True), (65, False), (2, False), (70, False)])
def test_a_job_that_lost_its_router_is_requeued_if_it_got_further(job, status, is_requeued):
    end(job, "node1", "75 3 stopped: asked")
    lost = f"(exit {status}) & PID[router]=$!; role_ended router; touch $DYPO_LOGS/stopped"
    code, said = job(
        f"{STARTS_AGAIN}ask_trainer_to_stop() {{ :; }}; reach 5; {lost}; (exit 0) & PID[trainer]=$!; role_ended trainer"
    )
    assert ("scontrol requeue 12" in said) is is_requeued
    assert f"router ended with status {status}" in said
    assert code == (0 if is_requeued else 1)


def test_the_statuses_of_a_lost_trainer_are_those_whose_cause_says_that_it_may_be_started_again():
    (cases,) = re.findall(r"case \$said in\s+([\d |]+)\)", (REPOSITORY / "slurm" / "supervise.sh").read_text())
    assert {int(status) for status in cases.split("|")} - {0, 75, 143} == {c.status for c in Cause if c.restart}


def test_starts_without_a_new_checkpoint_are_limited_and_a_checkpoint_begins_a_new_count(job):
    end(job, "node1", "77 3 rank_lost: rank 3 was killed by SIGKILL")
    again = "end=$DYPO_LOGS/ends/node1; lose() { echo '77 1 rank_lost: x' >$end; restart_trainer 77 lost; }; "
    code, said = job(f"{STARTS_AGAIN}{again} lose; lose; reach 5; lose; lose; lose; lose; echo never")
    assert said.count("start on node1 node2") == 1 + 5
    assert code == 1
    assert said.endswith(
        "dypo: error: lost; started 3 times since the run's last checkpoint, more than 1 + MAX_RESTARTS=2\n"
    )


@pytest.mark.parametrize(
    ("before", "after", "count"), [("400", "300", 2), ("400", "x", 2), ("300", "400", 1), ("", "2", 1)]
)
def test_only_a_later_checkpoint_counts_as_progress(job, before, after, count):
    """A damaged newest checkpoint moves the tracker back."""
    end(job, "node1", "77 3 rank_lost: rank 3 was killed by SIGKILL")
    script = STARTS_AGAIN.replace("\nstart_trainer\n", f"\nreach '{before}'\nstart_trainer\n")
    assert job(f"{script}reach '{after}'; restart_trainer 77 lost; echo $STARTS_AT_CHECKPOINT")[1].endswith(
        f"{count}\n"
    )


def test_a_trainer_that_starts_again_forgets_that_an_earlier_start_was_told_to_stop(job):
    """srun tells the other nodes to stop when one has failed; they leave the mark of a stop."""
    end(job, "node1", "77 3 rank_lost: rank 3 was killed by SIGKILL")
    end(job, "node2", "75 3 stopped: asked")
    (job.logs / "stopped").touch()
    assert job(f"{STARTS_AGAIN}restart_trainer 77 lost")[0] == 0
    assert not (job.logs / "stopped").exists()


@pytest.mark.parametrize(("line", "is_requeued"), [("77 3 rank_lost: rank 3 was killed", True), ("70 3 bug: x", False)])
def test_a_trainer_that_is_lost_while_it_saves_is_requeued(job, line, is_requeued):
    end(job, "node1", line)
    code, said = job(f"{STARTS_AGAIN}STOP_AT=5; restart_trainer 77 'how it ended'")
    assert ("scontrol requeue 12" in said) is is_requeued
    assert "how it ended" in said
    assert code == (0 if is_requeued else 1)


def test_steps_of_earlier_starts_of_an_attempt_count(job):
    end(job, "node1", "75 0 stopped: asked")
    earlier = job.logs.with_name("12.0")
    for folder, line in (("ends.1", "77 90 rank_lost: x"), ("ends", "75 0 stopped: asked")):
        (earlier / folder).mkdir(parents=True)
        (earlier / folder / "node1").write_text(line + "\n")
    assert "scontrol requeue 12" in job("conclude")[1]


def test_a_spare_node_trains_in_place_of_a_lost_one(job):
    script = STARTS_AGAIN.replace(
        "printf '%s\\n' ${SINFO:-}",
        'case "$*" in *node1*) echo "node1 alloc"; echo "node2 down*" ;; *) echo "node3 drng"; echo "node4 idle"; esac',
    )
    code, said = job(f"{script}restart_trainer 143 lost", SPARE_LIST="node3 node4")
    assert code == 0
    assert "dypo: node2 is lost; node4 trains in its place" in said
    assert "start on node1 node4, spare: \n" in said


def test_without_a_spare_node_a_job_with_a_lost_node_is_requeued_without_it(job):
    script = STARTS_AGAIN.replace("printf '%s\\n' ${SINFO:-}", 'echo "node1 alloc"; echo "node2 down*"')
    code, said = job(f"{script}restart_trainer 143 lost")
    assert code == 0
    assert "scontrol requeue 12\n" in said
    assert "ExcNodeList=node2" in said


def test_fields_of_a_resolved_config_are_read_from_their_own_section(job):
    resolved = (
        "data:\n  dir: other\nrun:\n  dir: /shared/my run\n  shared_files: false\nrollout:\n  shared_files: true\n"
    )
    read = 'for key in dir shared_files; do run_field "$key" <<<"$RESOLVED"; done'
    assert job(read, RESOLVED=resolved)[1] == "/shared/my run\nfalse\n"
