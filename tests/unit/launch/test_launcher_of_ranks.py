"""The exit status of a node's launcher, for all ends of its ranks."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dypo.ending import Cause
from megatron_dypo.launch.torchrun import Launcher, run_command
from megatron_dypo.metrics.status import RunStatus, read_status
from tests.support.present import present

TERM = Cause.TERMINATED.status


@pytest.fixture
def launcher(tmp_path):
    (tmp_path / "logs").mkdir()
    RunStatus(tmp_path, "this", 0).open()
    return Launcher(status=RunStatus(tmp_path, "this", -1), run_dir=tmp_path)


@pytest.mark.parametrize("cause", list(Cause))
def test_the_cause_that_a_rank_gave_is_the_launchers(launcher, tmp_path, cause, capsys):
    RunStatus(tmp_path, "this", 3).end(cause, "said by the rank")
    assert launcher.conclude({3: cause.status, 0: -signal.SIGTERM, 1: TERM}) == cause.status
    assert launcher.conclude({0: -signal.SIGTERM}) == cause.status  # ranks of another node failed
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("statuses", [{1: -signal.SIGKILL, 0: TERM}, {0: -signal.SIGTERM, 1: -signal.SIGKILL}])
def test_a_rank_that_was_killed_is_named_with_its_signal(launcher, tmp_path, statuses, capsys):
    assert launcher.conclude(statuses) == Cause.RANK_LOST.status
    assert capsys.readouterr().err.startswith(
        "megatron-dypo: error: rank_lost (status 77): rank 1 was killed by SIGKILL; "
    )
    found = present(read_status(tmp_path))
    assert (found.cause, found.message) == ("rank_lost", "rank 1 was killed by SIGKILL")
    assert "ended: rank_lost (status 77)" in (tmp_path / "logs" / "rank_00000.log").read_text()


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_a_rank_that_crashed_is_a_bug(launcher, tmp_path, number):
    assert launcher.conclude({1: -number, 0: TERM}) == Cause.BUG.status
    assert present(read_status(tmp_path)).message == f"rank 1 crashed ({number.name}); see its log in run.dir/logs"


def test_a_rank_that_ended_without_a_word_is_a_bug(launcher, tmp_path):
    assert launcher.conclude({1: 1}) == Cause.BUG.status
    assert present(read_status(tmp_path)).message == "rank 1 ended with 1"


def test_the_status_of_a_rank_that_could_not_write_is_passed_on(launcher, capsys):
    assert launcher.conclude({1: 74, 0: TERM}) == 74
    assert capsys.readouterr().err == ""


def test_the_end_of_another_attempt_is_not_taken_for_this_ones(launcher, tmp_path):
    RunStatus(tmp_path, "another", 0).open()
    RunStatus(tmp_path, "another", 0).end(Cause.DONE, "")
    assert launcher.conclude({1: -signal.SIGKILL}) == Cause.RANK_LOST.status
    assert present(read_status(tmp_path)).cause == "done"


def test_what_the_ranks_will_run_is_read_from_torchruns_arguments():
    words = ["--standalone", "--nproc-per-node=2", "-m", "megatron_dypo.cli", "train", "a.yaml", "run.steps=3"]
    assert run_command(words) == ["train", "a.yaml", "run.steps=3"]
    assert run_command(["--standalone", "program.py", "train", "a.yaml"]) is None


def torchrun(*arguments, cwd, **environment):
    command = [sys.executable, "-m", "megatron_dypo.launch.torchrun", "--standalone", "--nproc-per-node=2", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), **environment}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stderr


def test_torchrun_passes_on_the_status_of_the_first_rank_that_failed_and_says_nothing(tmp_path):
    program = """
import os, signal, sys
if os.environ["RANK"] == "1":
    sys.exit(65)
signal.sigwait([signal.SIGTERM])
"""
    (tmp_path / "program.py").write_text(program)
    code, errors = torchrun("program.py", cwd=tmp_path, MEGATRON_DYPO_END_FILE="end")
    assert (code, errors) == (65, "")
    assert (tmp_path / "end").read_text().startswith("65 ?")


def test_a_mistake_in_the_config_is_one_line_on_any_number_of_ranks(tmp_path):
    (tmp_path / "config.yaml").write_text("run: {steps: 0}\nmodel: {hf_path: m}\ndata: {prompts: [p]}\n")
    code, errors = torchrun(
        "-m", "megatron_dypo.cli", "train", "config.yaml", cwd=tmp_path, MEGATRON_DYPO_END_FILE="end"
    )
    assert code == Cause.BAD_INPUT.status
    assert len(errors.splitlines()) == 1
    assert errors.startswith("megatron-dypo: error: ")
    assert "steps=0" in errors
    assert (tmp_path / "end").read_text().startswith("65 ?")
