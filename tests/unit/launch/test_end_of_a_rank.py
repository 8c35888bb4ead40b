"""Each way in which a rank can end has an exit status, a line for the user, and a record in the run folder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_dypo.ending import Cause
from tests.support.present import present

REPOSITORY = Path(__file__).parents[3]
PROGRAM = """
import errno, os, resource, signal, sys, time
from megatron_dypo.processes.stop_requests import hold_requests, is_requested
hold_requests()
from megatron_dypo.launch import attempt
from megatron_dypo.config.data import DataConfig
from megatron_dypo.config.model import ModelConfig
from megatron_dypo.config.run import RunConfig
from megatron_dypo.config.tree import Config
from megatron_dypo.ending import Cause, RunEnded
from megatron_dypo.metrics.status import report
run = RunConfig(dir=sys.argv[1], watchdog_s=0)
config = Config(run=run, model=ModelConfig(hf_path="m"), data=DataConfig(prompts=("p",)))
def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
def work(config):
    report(step=3, steps=400, counts={"groups": 48})
"""
END = "\nsys.exit(attempt.run_rank(config, work))"


def start(run_dir, body, **environment):
    body = "\n".join(f"    {line}" for line in body.splitlines())
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM + body + END, str(run_dir)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def status_of(run_dir):
    return json.loads((run_dir / "status.json").read_text())


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


ENDS = [
    ("pass", Cause.DONE, "done (status 0): run folder "),
    (
        "raise RunEnded(Cause.STOPPED, 'stopped on request')",
        Cause.STOPPED,
        "stopped (status 75): stopped on request; 3 of 400 steps are done",
    ),
    (
        "raise RunEnded(Cause.NOTHING_LEFT, 'all Easy')",
        Cause.NOTHING_LEFT,
        "error: nothing_left (status 10): all Easy; 3",
    ),
    ("raise MemoryError", Cause.OUT_OF_MEMORY, "error: out_of_memory (status 71): MemoryError; 3 of 400"),
    (
        "raise OSError(errno.ENOSPC, 'No space')",
        Cause.DISK_FULL,
        "error: disk_full (status 74): [Errno 28] No space; 3",
    ),
    (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "with open(config.run.dir + '/x', 'wb') as file:\n    file.write(bytes(10000))",
        Cause.DISK_FULL,
        "error: disk_full (status 74): [Errno 27] File too large",
    ),
    (
        "from megatron_dypo.checks import require; require(False, 'a=1', 'must be 2')",
        Cause.BAD_INPUT,
        "error: a=1",
    ),
    (
        "{}['absent']",
        Cause.BUG,
        "error: bug (status 70): 'absent'; 3 of 400 steps are done; groups: 48; report it with",
    ),
    ("sys.exit(0)", Cause.BUG, "error: bug (status 70): sys.exit(0); 3 of 400"),
    ("int('a library refuses this')", Cause.BUG, "error: bug (status 70): invalid literal"),
]


@pytest.mark.parametrize(("body", "cause", "line"), ENDS, ids=[body[:30] for body, _, _ in ENDS])
def test_an_end_has_the_status_of_its_cause_and_is_told_in_one_line(tmp_path, body, cause, line):
    code, errors = finish(start(tmp_path / "run", body))
    assert code == cause.status, errors
    assert errors.splitlines()[-1].startswith(f"megatron-dypo: {line}")
    assert ("Traceback" in errors) == (cause is Cause.BUG)
    assert cause is Cause.BUG or len(errors.splitlines()) == 1
    status = status_of(tmp_path / "run")
    expected = {"state": "ended", "cause": cause.label, "status": cause.status, "requeue": cause.requeue, "step": 3}
    assert expected.items() <= status.items()
    assert status["counts"] == {"groups": 48}
    log = (tmp_path / "run" / "logs" / "rank_00000.log").read_text()
    assert f"ended: {cause.label} (status {cause.status})" in log
    assert not (tmp_path / "run" / "run.lock").exists()


def two_ranks(run_dir, first, second):
    shared = {"WORLD_SIZE": "2", "MEGATRON_DYPO_ATTEMPT": "of this test"}
    rank_0 = start(run_dir, first, RANK="0", LOCAL_RANK="0", **shared)
    wait_for(lambda: (run_dir / "status.json").is_file())
    return finish(start(run_dir, second, RANK="1", LOCAL_RANK="1", **shared)), finish(rank_0)


def test_a_rank_that_lost_its_peer_ends_with_the_cause_that_the_peer_gives(tmp_path):
    victim = "raise RuntimeError('[pair.cc:534] Connection closed by peer [127.0.0.1]:1234')"
    (code, errors), (victim_code, victim_errors) = two_ranks(tmp_path / "run", victim, "{}['absent']")
    assert (code, victim_code) == (70, 70)
    assert "KeyError: 'absent'" in errors
    assert victim_errors == ""
    assert status_of(tmp_path / "run")["rank"] == 1
    assert "KeyError" in (tmp_path / "run" / "logs" / "rank_00001.log").read_text()
    assert "closed by peer" in (tmp_path / "run" / "logs" / "rank_00000.log").read_text()


def test_a_rank_that_lost_its_peer_says_so_where_nobody_else_says_why(tmp_path):
    body = "attempt.VICTIM_WAIT_S = 0; raise RuntimeError('Connection closed by peer')"
    code, errors = finish(start(tmp_path / "run", body))
    assert code == Cause.RANK_LOST.status
    assert errors.startswith("megatron-dypo: error: rank_lost (status 77): Connection closed by peer")


def test_an_end_of_all_ranks_together_is_told_once_by_the_first(tmp_path):
    body = "raise RunEnded(Cause.GROUPS_LOST, 'no group came back')"
    (code, errors), (first_code, first_errors) = two_ranks(tmp_path / "run", body, body)
    assert (code, first_code) == (11, 11)
    assert errors == ""
    assert len(first_errors.splitlines()) == 1
    assert status_of(tmp_path / "run")["rank"] == 0


def test_done_is_said_by_the_first_rank_alone(tmp_path):
    # The second has returned from the loop while the first still exports, and fails.
    body = "until(lambda: os.path.exists(config.run.dir + '/other_is_done')); raise MemoryError"
    run_dir = tmp_path / "run"
    shared = {"WORLD_SIZE": "2", "MEGATRON_DYPO_ATTEMPT": "of this test"}
    first = start(run_dir, body, RANK="0", **shared)
    wait_for(lambda: (run_dir / "status.json").is_file())
    assert finish(start(run_dir, "pass", RANK="1", **shared)) == (0, "")
    (run_dir / "other_is_done").touch()
    assert finish(first)[0] == Cause.OUT_OF_MEMORY.status
    assert status_of(run_dir)["cause"] == "out_of_memory"


LOOP = """
is_requested()
open(config.run.dir + '/looping', 'w').close()
until(is_requested)
raise RunEnded(Cause.STOPPED, 'stopped on request')
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_asks_the_loop_to_stop(tmp_path, number):
    process = start(tmp_path / "run", LOOP)
    wait_for(lambda: (tmp_path / "run" / "looping").exists())
    process.send_signal(number)
    code, errors = finish(process)
    assert code == Cause.STOPPED.status
    assert f"{number.name}: the run finishes its step, saves a checkpoint and ends" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(("number", "cause"), [(signal.SIGINT, Cause.INTERRUPTED), (signal.SIGTERM, Cause.TERMINATED)])
def test_the_second_signal_ends_at_once(tmp_path, number, cause):
    body = "is_requested(); open(config.run.dir + '/looping', 'w').close(); until(lambda: False)"
    process = start(tmp_path / "run", "attempt.stop_requests.ECHO_S = 0\n" + body)
    log = tmp_path / "run" / "logs" / "rank_00000.log"
    wait_for(lambda: (tmp_path / "run" / "looping").exists())
    process.send_signal(number)
    wait_for(lambda: number.name in log.read_text())
    process.send_signal(number)
    code, errors = finish(process)
    assert code == cause.status
    assert f"error: {cause.label} (status {cause.status}): ended at once by a second {number.name}" in errors
    assert status_of(tmp_path / "run")["cause"] == cause.label
    assert not (tmp_path / "run" / "run.lock").exists()


def test_a_request_during_start_up_ends_the_run_without_a_wait(tmp_path):
    process = start(tmp_path / "run", "open(config.run.dir + '/starting', 'w').close(); until(lambda: False)")
    wait_for(lambda: (tmp_path / "run" / "starting").exists())
    process.terminate()
    code, errors = finish(process)
    assert code == Cause.STOPPED.status
    assert "stopped on request (SIGTERM) before the first step of this start" in errors


def test_a_hangup_that_is_ignored_stays_ignored(tmp_path):
    process = subprocess.Popen(
        [
            "nohup",
            sys.executable,
            "-c",
            PROGRAM + "\n".join(f"    {x}" for x in LOOP.splitlines()) + END,
            tmp_path / "run",
        ],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    wait_for(lambda: (tmp_path / "run" / "looping").exists())
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGUSR1)
    code, errors = finish(process)
    assert code == Cause.STOPPED.status
    assert "SIGHUP" not in errors


def test_a_rank_of_torchrun_ends_at_once_when_its_launcher_tells_it_to(tmp_path):
    # This process plays the launcher: it started the rank.
    process = start(tmp_path / "run", LOOP, RANK="0", WORLD_SIZE="1")
    wait_for(lambda: (tmp_path / "run" / "looping").exists())
    process.terminate()
    assert finish(process) == (Cause.TERMINATED.status, "")
    assert status_of(tmp_path / "run")["state"] == "running"  # the launcher writes the cause, not the rank
    assert not (tmp_path / "run" / "run.lock").exists()


def test_a_rank_of_torchrun_takes_a_termination_by_others_for_a_request(tmp_path):
    process = start(tmp_path / "run", LOOP, RANK="0", WORLD_SIZE="1")
    wait_for(lambda: (tmp_path / "run" / "looping").exists())
    subprocess.run([sys.executable, "-c", f"import os; os.kill({process.pid}, 15)"], check=True)
    assert finish(process)[0] == Cause.STOPPED.status


def test_a_second_run_on_a_folder_in_use_is_refused_in_one_line_and_touches_nothing(tmp_path):
    run_dir = tmp_path / "run"
    first = start(run_dir, LOOP)
    wait_for(lambda: (run_dir / "looping").exists())
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    code, errors = finish(start(run_dir, "pass"))
    assert code == Cause.IN_USE.status
    assert len(errors.splitlines()) == 1
    assert f"in use by process {first.pid} on {os.uname().nodename}" in errors
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    first.send_signal(signal.SIGUSR1)
    assert finish(first)[0] == Cause.STOPPED.status


def test_a_run_that_was_killed_leaves_its_folder_to_the_next(tmp_path):
    first = start(tmp_path / "run", LOOP)
    wait_for(lambda: (tmp_path / "run" / "looping").exists())
    first.kill()
    finish(first)
    assert status_of(tmp_path / "run")["state"] == "running"
    assert finish(start(tmp_path / "run", "pass"))[0] == 0


def test_a_request_while_inputs_are_read_ends_the_command(tmp_path):
    program = "import time; from megatron_dypo.launch.attempt import stop_before_start; "
    program += "from megatron_dypo.processes.stop_requests import *"
    program += "; hold_requests(); stop_before_start(); print('ready', file=sys.stderr, flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", f"import sys; {program}"], stderr=subprocess.PIPE, text=True)
    assert present(process.stderr).readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    code, errors = finish(process)
    assert code == Cause.STOPPED.status
    assert errors.startswith(
        "megatron-dypo: stopped (status 75): stopped on request (SIGINT) before anything was started"
    )
