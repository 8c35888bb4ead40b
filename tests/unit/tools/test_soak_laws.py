"""The laws that a soak checks, on records that obey or break them, and its damage to checkpoints."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tools.soak import compare_accuracies
from tools.soak_parts.faults import FAULTS, flip_a_bit
from tools.soak_parts.invariants import GAP, Sample, growth, violations
from tools.soak_parts.processes import RunProcesses, find_processes
from tools.soak_parts.soak import outlive

WAITS = "import threading; threading.Event().wait()"


def record(step: int, **changes: Any) -> dict[str, Any]:
    books = {"ledger/drawn": 8.0 * step, "ledger/trained_rl": 6.0 * step, "ledger/dropped_easy": 2.0 * step}
    return {"step": step, **books, GAP: 1e-5, **changes}


GOOD = [{"step": 0}, *(record(step) for step in range(1, 6))]


def test_records_that_obey_break_no_law() -> None:
    assert violations(GOOD, max_gap=1e-3) == []
    assert violations([], max_gap=1e-3) == []


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([*GOOD[:3], *GOOD[4:]], "step 4 follows step 2"),
        ([*GOOD[:3], *GOOD[2:]], "step 2 follows step 2"),
        ([*GOOD[:-1], record(5, **{"ledger/dropped_easy": 9.0})], "step 5: 40 draws, and 39 in the accounts"),
        ([*GOOD[:-1], record(5, **{"ledger/drawn": 16.0, "ledger/trained_rl": 6.0})], "step 5: 16 draws after 32"),
        ([*GOOD[:-1], record(5, **{GAP: 0.01})], f"step 5: {GAP}=0.01, more than 0.001"),
        ([*GOOD[:-1], record(5, **{GAP: None})], f"step 5: {GAP}=None"),
    ],
)
def test_each_law_that_is_broken_is_named(records: list[dict[str, Any]], words: str) -> None:
    assert any(words in line for line in violations(records, max_gap=1e-3))


def life(values: list[int], **fields: Any) -> list[Sample]:
    base = {"start": 1, "role": "rank", "pid": 7, "time": 0.0, "descriptors": 10, "threads": 3}
    return [Sample(**{**base, **fields}, rss=value) for value in values]


def test_the_growth_is_that_of_the_last_third_over_the_second_of_the_process_that_grew_most() -> None:
    flat, grows, short = [100] * 240, [500] * 80 + [100] * 80 + [130] * 80, [1] * 50 + [9] * 50
    samples = [*life(flat, pid=1), *life(grows, pid=2), *life(short, pid=3), *life(flat, role="server", pid=4)]
    assert growth(samples)["rss"] == {"rank": pytest.approx(0.3), "server": 0.0}
    assert growth(samples)["threads"] == {"rank": 0.0, "server": 0.0}


def test_accuracies_are_compared_at_the_last_step_at_which_both_runs_were_evaluated() -> None:
    def evaluated(step: int, value: float) -> dict[str, Any]:
        name = "eval/heldout/accuracy"
        return {"step": step, name: value, f"{name}_low": value - 0.1, f"{name}_high": value + 0.1}

    calm = [evaluated(0, 0.1), evaluated(50, 0.5), evaluated(100, 0.9)]
    step, found = compare_accuracies(calm, [evaluated(0, 0.2), evaluated(50, 0.4), record(60)])
    assert step == 50
    values = {run: sets["eval/heldout/accuracy"] for run, sets in found.items()}
    assert values == {"calm": [0.5, 0.4, 0.6], "faults": [0.4, pytest.approx(0.3), 0.5]}
    assert compare_accuracies(calm, []) == (None, {"calm": {}, "faults": {}})


def test_one_bit_of_the_newest_checkpoint_is_flipped_if_there_is_an_older_one(tmp_path: Path) -> None:
    damaged = set[str]()
    for step in (1, 2):
        folder = tmp_path / "checkpoints" / f"step_{step:06d}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text("{}")
        if step == 1:
            assert flip_a_bit(tmp_path, random.Random(1), damaged) is None
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    assert flip_a_bit(tmp_path, random.Random(1), damaged) is not None
    assert flip_a_bit(tmp_path, random.Random(2), damaged) is None, "the only whole one stays so"
    contents = [(tmp_path / "checkpoints" / f"step_00000{n}" / "trainer_state.json").read_bytes() for n in (1, 2)]
    different = [bin(a ^ b).count("1") for a, b in zip(b"{}", contents[1], strict=True)]
    assert contents[0] == b"{}"
    assert sum(different) == 1


def test_a_fault_reaches_its_process_and_a_stopped_one_goes_on() -> None:
    with subprocess.Popen([sys.executable, "-c", WAITS]) as process:
        found = find_processes(psutil.Process(process.pid))
        assert found.ranks == (found.command,)
        assert found.launcher is None
        rng, at_once = random.Random(1), threading.Event()
        at_once.set()
        assert FAULTS["kill a server"].do(found, rng, at_once) is None, "it has none"
        assert FAULTS["kill the launcher"].do(found, rng, at_once) is None
        words = FAULTS["stop a rank"].do(found, rng, at_once)
        assert words is not None
        assert "SIGSTOP" in words
        assert psutil.Process(process.pid).status() != psutil.STATUS_STOPPED
        FAULTS["kill a rank"].do(found, rng, at_once)
        assert process.wait(60) == -9


def test_processes_that_outlive_their_run_are_told_from_those_that_have_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", WAITS]) as lives, subprocess.Popen(["true"]) as ended:
        both = [psutil.Process(lives.pid), psutil.Process(ended.pid)]
        assert [one.pid for one in outlive(both, 1.0)] == [lives.pid]
        lives.kill()
        lives.wait(60)
        assert outlive(both, 60.0) == []


SPAWNER = """
import os, subprocess, sys, threading
if sys.argv[2:]:  # the next level: a name, and the names below it
    subprocess.Popen([sys.executable, __file__, *sys.argv[2:]], env={**os.environ, "RANK": "0"})
threading.Event().wait()
"""


def test_the_processes_of_a_run_are_told_apart_by_their_command_lines(tmp_path: Path) -> None:
    script = tmp_path / "spawner.py"
    script.write_text(SPAWNER)
    levels = ["launcher", "megatron_dypo.cli", "megatron_dypo.processes.guard", "sglang_cpu.py", "sglang_cpu.py"]
    with subprocess.Popen([sys.executable, str(script), *levels]) as process:
        command = psutil.Process(process.pid)
        try:
            found = _when(command, lambda run: len(run.all) == len(levels))
            below = [command, *command.children(recursive=True)]
            assert found.launcher == command
            assert found.servers == (below[3],)
            assert found.verifiers == ()
        finally:
            for one in (*command.children(recursive=True), command):
                one.kill()


def _when(command: psutil.Process, is_so: Any, deadline_s: float = 60.0) -> RunProcesses:
    end = time.monotonic() + deadline_s
    while not is_so(found := find_processes(command)):
        assert time.monotonic() < end
    return found
