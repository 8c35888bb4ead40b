"""One run at a time uses a run folder, in whatever way the last run ended."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest

from megatron_dypo.ending import Cause, RunEnded
from megatron_dypo.launch.run_folder import make_run_folder
from megatron_dypo.launch.run_lock import NAME, STALE_S, RunLock, read_holder, remove_dead, require_free
from megatron_dypo.processes.identity import own_identity
from tests.support.present import present


def make_lock(folder, **settings):
    return RunLock(folder, on_loss=pytest.fail, **settings)


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def left_by(folder, *, job="", age_s=0.0, **process):
    """Write the lock that a process left: one on another machine, unless ``process`` names one."""
    identity = asdict(own_identity()) | {"machine": "another", "host": "node7"} | process
    text = json.dumps({"token": "t", "process": identity, "since": "then", "job": job})
    (folder / NAME).write_text(text)
    os.utime(folder / NAME, (t := (folder / NAME).stat().st_mtime - age_s, t))


def gone():
    """Return the identity of a process of this machine that has ended."""
    code = "import json; from dataclasses import asdict; from megatron_dypo.processes.identity import own_identity; "
    done = subprocess.run(
        [sys.executable, "-c", code + "print(json.dumps(asdict(own_identity())))"], capture_output=True, check=True
    )
    return json.loads(done.stdout)


def assert_refused(folder, *words):
    with pytest.raises(RunEnded) as error:
        make_lock(folder).acquire()
    assert error.value.cause is Cause.IN_USE
    assert all(word in str(error.value) for word in (str(folder), *words)), error.value
    assert "\n" not in str(error.value)


def test_a_lock_is_held_until_it_is_released(tmp_path):
    (lock := make_lock(tmp_path)).acquire()
    assert_refused(tmp_path, f"process {os.getpid()} on ", "since 2")
    lock.release()
    assert list(tmp_path.iterdir()) == []
    (again := make_lock(tmp_path)).acquire()
    lock.release()  # the first run's lock, not the second's
    assert read_holder(tmp_path) is not None
    again.release()


@pytest.mark.parametrize("repeat", range(20))
def test_of_many_that_try_at_once_one_gets_the_lock(tmp_path, repeat):
    left_by(tmp_path, **gone())

    def attempt(_):
        try:
            make_lock(tmp_path).acquire()
        except RunEnded:
            return 0
        return 1

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(attempt, range(16))) == 1
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_process_of_this_machine_that_has_ended_holds_nothing(tmp_path):
    left_by(tmp_path, **gone())
    make_lock(tmp_path).acquire()


def test_another_process_with_the_number_of_the_holder_is_not_the_holder(tmp_path):
    left_by(tmp_path, **(asdict(own_identity()) | {"birth": "1"}))
    make_lock(tmp_path).acquire()


def test_another_machine_holds_the_lock_while_it_touches_it(tmp_path):
    left_by(tmp_path, age_s=STALE_S - 30)
    assert_refused(tmp_path, "on node7", "last sign of life 150 s ago", f"free after {STALE_S:.0f} s")
    left_by(tmp_path, age_s=STALE_S + 1)
    make_lock(tmp_path).acquire()


def test_a_reboot_is_another_machine(tmp_path):
    boot, _, namespace = own_identity().machine.partition(" ")
    left_by(tmp_path, **(asdict(own_identity()) | {"machine": f"{boot[::-1]} {namespace}", "birth": "1"}))
    assert_refused(tmp_path)


@pytest.mark.parametrize(
    ("mine", "is_free"),
    [("12.1.0", True), ("12.0.2", True), ("12.0.1", False), ("12.0.0", False), ("13.1.0", False), (None, False)],
)
def test_a_job_takes_the_lock_of_its_earlier_attempt_or_trainer_at_once(tmp_path, monkeypatch, mine, is_free):
    names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "DYPO_TRAINER_START")
    for name, value in zip(names, (mine or "").split("."), strict=False):
        monkeypatch.setenv(name, value)
    if mine is None:
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    left_by(tmp_path, job="12.0.1")
    if is_free:
        make_lock(tmp_path).acquire()
    else:
        assert_refused(tmp_path, "Slurm job 12")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"token": 1}', "\0\0"])
def test_a_lock_that_cannot_be_read_holds_while_it_is_young(tmp_path, text):
    (tmp_path / NAME).write_text(text)
    assert_refused(tmp_path, "is being written")
    os.utime(tmp_path / NAME, (1, 1))
    make_lock(tmp_path).acquire()


def test_the_holder_touches_its_lock_and_makes_it_again_where_it_was_tidied_away(tmp_path):
    (lock := make_lock(tmp_path, beat_s=0.01)).acquire()
    os.utime(tmp_path / NAME, (1, 1))
    wait_for(lambda: (tmp_path / NAME).stat().st_mtime != 1)
    (tmp_path / NAME).unlink()
    wait_for(lambda: (tmp_path / NAME).exists())
    lock.release()


def test_a_holder_that_slept_and_lost_its_lock_is_told(tmp_path):
    told: list[str] = []
    lock = RunLock(tmp_path, on_loss=told.append, beat_s=0.01)
    lock.acquire()
    left_by(tmp_path)
    wait_for(lambda: told)
    assert "was taken over by process" in told[0]
    lock.release()
    assert present(read_holder(tmp_path)).token == "t"


def test_the_launcher_removes_only_a_dead_ranks_lock(tmp_path):
    remove_dead(tmp_path)
    left_by(tmp_path, **gone())
    remove_dead(tmp_path)
    require_free(tmp_path)
    assert not (tmp_path / NAME).exists()
    left_by(tmp_path, **asdict(own_identity()))
    remove_dead(tmp_path)
    assert (tmp_path / NAME).exists()


def obstruct_file(folder):
    (folder / "run").write_text("")
    return "a file is there"


def obstruct_parent(folder):
    (folder / "run").write_text("")
    return folder / "run" / "below", "Not a directory"


def obstruct_loop(folder):
    (folder / "run").symlink_to("run")
    return "cannot be made or written to: Too many levels|a file is there"


def obstruct_logs(folder):
    (folder / "run").mkdir()
    (folder / "run" / "logs").write_text("")
    return "logs is not a folder"


def obstruct_metrics(folder):
    (folder / "run" / "metrics.jsonl").mkdir(parents=True)
    return "metrics.jsonl is not a file"


@pytest.mark.parametrize("obstruct", [obstruct_file, obstruct_parent, obstruct_loop, obstruct_logs, obstruct_metrics])
def test_a_run_folder_that_cannot_be_used_is_refused_by_name(tmp_path, obstruct):
    found = obstruct(tmp_path)
    path, message = found if isinstance(found, tuple) else (tmp_path / "run", found)
    with pytest.raises(ValueError, match=message) as error:
        make_run_folder(path)
    assert str(error.value).startswith(f"run.dir='{path}'")


@pytest.mark.parametrize("path", ["x" * 300, "a\0b", "/proc/nothing/run"])
def test_a_run_folder_that_cannot_be_made_is_refused(path):
    with pytest.raises(ValueError, match="cannot be made or written to"):
        make_run_folder(path)
