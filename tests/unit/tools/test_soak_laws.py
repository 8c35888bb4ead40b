"""The laws that a soak checks on records, on records that obey or break them, and its damage to checkpoints."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_dypo.config.reading.load import load_config
from tests.support.soak_cases import GOOD, last_changed, record
from tools.soak import compare_accuracies
from tools.soak_parts.allowed import Allowed, allowed_by
from tools.soak_parts.faults import FAULTS, flip_a_bit
from tools.soak_parts.invariants import GAP, SERVERS_GAP, STALENESS, VERSION, violations
from tools.soak_parts.processes import RunProcesses, find_processes
from tools.soak_parts.soak import outlive

ROOT = Path(__file__).resolve().parents[3]
WAITS = "import threading; threading.Event().wait()"


ROUNDS = Allowed(
    max_gap=1e-3,
    in_rounds=True,
    max_lag=4,
    max_staleness=4,
    max_waiting=64,
    max_buffered=0,
    max_open=0,
    trainer_measures=True,
    servers_are_checked=False,
)
STREAM = replace(ROUNDS, in_rounds=False)
BY_SERVERS = replace(ROUNDS, trainer_measures=False, servers_are_checked=True)
NO_ROLLOUTS: dict[str, Any] = {"gate/offline_share_sequences": 1.0}


def test_records_that_obey_break_no_law() -> None:
    for allowed in (ROUNDS, STREAM):
        assert violations(GOOD, allowed) == []
        assert violations([], allowed) == []


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([*GOOD[:3], *GOOD[4:]], "step 4 follows step 2"),
        ([*GOOD[:3], *GOOD[2:]], "step 2 follows step 2"),
        (GOOD[2:], "step 2 is the first"),
        (last_changed(**{"ledger/dropped_easy": 9.0}), "step 5: 45 draws, and 44 in the accounts"),
        (last_changed(**{"ledger/drawn": 16.0, "ledger/trained_rl": 1.0}), "step 5: 16 draws after 37"),
        (last_changed(**{GAP: 0.01}), f"step 5: {GAP}=0.01, more than 0.001"),
        (last_changed(**{GAP: None}), f"step 5: {GAP}=None"),
        (last_changed(without=(GAP,)), f"step 5: {GAP} is missing"),
        (last_changed(without=("gate/offline_share_sequences", GAP)), f"step 5: {GAP} is missing"),
        (last_changed(without=("ledger/drawn",)), "step 5: ledger/drawn is missing"),
        (last_changed(without=("queue/reinforce",)), "step 5: queue/reinforce is missing"),
        (last_changed(without=(STALENESS,)), f"step 5: {STALENESS} is missing"),
        (last_changed(without=(VERSION,)), f"step 5: {VERSION} is missing"),
        (last_changed(**{VERSION: 5.0}), f"step 5: {VERSION}=5, not from 4 to 4"),
        (last_changed(**{VERSION: 2.0}), f"step 5: {VERSION}=2, not from 4 to 4"),
        (last_changed(**{STALENESS: 4.5}), f"step 5: {STALENESS}=4.5, not from 0 to 4"),
        (last_changed(**{STALENESS: -0.1}), f"step 5: {STALENESS}=-0.1, not from 0 to 4"),
        (last_changed(**{"queue/stale": -1.0}), "step 5: queue/stale=-1, below 0"),
        (last_changed(**{"ledger/dropped_easy": -1.0}), "step 5: ledger/dropped_easy=-1, below 0"),
        (last_changed(**{"queue/reinforce": 64.0}), "step 5: 65 prompts in the queues, more than 64"),
        (last_changed(**{"ledger/in_flight": 65.0}), "step 5: 65 prompts in flight, more than 64"),
        (last_changed(**{"queue/buffer": 1.0}), "step 5: 1 traces in the buffer, more than 0"),
        (last_changed(**{"queue/reinforce": 3.0}), "step 5: ledger/waiting is 1 above the queues, not from 0 to 0"),
        (last_changed(**{"queue/reinforce": 5.0}), "step 5: ledger/waiting is -1 above the queues"),
    ],
)
def test_each_law_that_is_broken_is_named(records: list[dict[str, Any]], words: str) -> None:
    assert any(words in line for line in violations(records, ROUNDS))


def test_a_step_that_learned_from_traces_alone_needs_no_gap() -> None:
    assert violations(last_changed(without=(GAP,), **NO_ROLLOUTS), ROUNDS) == []


def test_a_step_that_collected_nothing_needs_no_version() -> None:
    assert violations(last_changed(without=(VERSION, "rollout/num_rollouts")), ROUNDS) == []


def test_from_a_stream_rollouts_may_be_as_old_as_the_config_allows() -> None:
    late = [record(step) | {VERSION: step - 5.0} for step in range(6, 9)]
    assert violations([*GOOD, *late], STREAM) == []
    older = record(9) | {VERSION: 3.5}
    assert violations([*GOOD, *late, older], STREAM) == [f"step 9: {VERSION}=3.5, not from 4 to 8"]
    assert violations([*GOOD, *late, older | {"queue/stale": 1.0}], STREAM) == [], "those that were dropped count too"
    assert violations(last_changed(**{VERSION: 4.1}), STREAM) == [f"step 5: {VERSION}=4.1, not from 0 to 4"]


def test_where_the_servers_log_probs_are_used_their_error_is_the_gap() -> None:
    without = [record(step, without=(GAP,)) for step in range(1, 6)]
    assert violations(without, BY_SERVERS) == [f"{SERVERS_GAP} is in no record"]
    measured = [record(6, without=(GAP,), **{SERVERS_GAP: 1e-4})]
    assert violations([*without, *measured], BY_SERVERS) == []
    measured = [record(6, without=(GAP,), **{SERVERS_GAP: 0.2})]
    assert violations([*without, *measured], BY_SERVERS) == [f"step 6: {SERVERS_GAP}=0.2, more than 0.001"]


def test_the_bounds_are_those_of_the_config() -> None:
    path = ROOT / "examples/quickstart/dypo.yaml"
    rounds = allowed_by(load_config(path), 1e-3)
    config = load_config(
        path, ["batching.updates_per_batch=2", "batching.max_staleness=3", "batching.max_collect_rounds=5"]
    )
    several = allowed_by(config, 1e-3)
    assert rounds.in_rounds
    assert rounds.trainer_measures
    assert (rounds.max_open, rounds.max_buffered) == (0, 0)
    assert (several.max_lag, several.max_staleness) == (6, 7)
    assert several.max_open == 2 * config.batching.prompts_per_update
    assert several.max_waiting == 5 * config.rollout.prompts_per_round
    relift = allowed_by(load_config(path, ["objective.name=relift", "objective.options={buffer_keeps: 200}"]), 1e-3)
    assert relift.max_staleness == math.inf
    assert relift.max_buffered == 200
    server = ["rollout.mode=async", "old_logp.source=server", "objective.gal_coefficients=exact"]
    stream = allowed_by(load_config(path, server), 1e-3)
    assert not stream.in_rounds
    assert not stream.trainer_measures
    assert stream.servers_are_checked
    assert stream.max_waiting > rounds.max_waiting


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


def test_a_checkpoint_that_was_set_aside_is_no_older_one_to_go_back_to(tmp_path: Path) -> None:
    for name in ("step_000001.damaged", "step_000002"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "trainer_state.json").write_text("{}")
    assert flip_a_bit(tmp_path, random.Random(1), set()) is None


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
            assert found.server_workers() == (below[4],)
            assert found.verifiers == ()
        finally:
            for one in (*command.children(recursive=True), command):
                one.kill()


def _when(command: psutil.Process, is_so: Any, deadline_s: float = 60.0) -> RunProcesses:
    end = time.monotonic() + deadline_s
    while not is_so(found := find_processes(command)):
        assert time.monotonic() < end
    return found
