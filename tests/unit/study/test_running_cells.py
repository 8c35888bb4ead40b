"""Cells run once and go on after any end; a failure of one is reported and stops no other. Commands are stand-ins."""

from __future__ import annotations

import json
import os
import signal
import stat
from collections import Counter

import psutil
import pytest

from megatron_dypo.config.eval_command import EvalCommandConfig
from megatron_dypo.config.reading.load import load_config, load_tree
from megatron_dypo.ending import Cause
from megatron_dypo.study.compare import open_comparison
from tests.support.study.comparisons import (
    compare,
    journal_lines,
    run_here,
    start_compare,
    tell,
    wait_until,
    write_comparison,
)

CELLS = ["dypo/seed-1", "grpo/seed-1", "dypo/seed-2", "grpo/seed-2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Run a comparison undisturbed; return its folder, and the table that it printed."""
    folder = tmp_path_factory.mktemp("whole")
    table, _ = compare(write_comparison(folder))
    return folder, table


def counts(folder, verb):
    return Counter(line.removeprefix(verb + " ") for line in journal_lines(folder) if line.startswith(verb + " "))


def test_every_cell_is_trained_then_evaluated_once_seed_by_seed(whole):
    folder, _ = whole
    verbs = ("begin train", "end train", "begin eval", "end eval")
    assert journal_lines(folder) == [f"{verb} {cell}" for cell in CELLS for verb in verbs]


def test_a_comparison_that_is_done_runs_nothing_and_writes_the_same(whole):
    folder, table = whole
    before = {path: path.read_bytes() for path in (folder / "out" / "tables").iterdir()}
    lines = journal_lines(folder)
    assert run_here(folder / "comparison.yaml") == ([], table.rstrip("\n") + "\n")
    assert journal_lines(folder) == lines
    assert {path: path.read_bytes() for path in (folder / "out" / "tables").iterdir()} == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "asked to stop"])
def test_a_comparison_that_is_ended_and_started_again_gives_the_same_table_and_runs_nothing_twice(
    number, whole, tmp_path
):
    path = write_comparison(tmp_path)
    hold = tell(tmp_path, "hold", CELLS[1])
    first = start_compare(path)
    wait_until(lambda: f"begin train {CELLS[1]}" in journal_lines(tmp_path), "the second cell is trained")
    running = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(number)
    first.communicate(timeout=120)
    assert first.returncode == (-9 if number == signal.SIGKILL else Cause.STOPPED.status)
    gone, alive = psutil.wait_procs(running, timeout=120)
    assert gone
    assert not alive
    assert json.loads((tmp_path / "out/cells" / CELLS[1] / "run/status.json").read_text())["cause"] == "stopped"
    hold.unlink()
    assert run_here(path) == ([], whole[1].rstrip("\n") + "\n")
    assert counts(tmp_path, "begin train") == Counter({**dict.fromkeys(CELLS, 1), CELLS[1]: 2})
    for verb in ("end train", "begin eval", "end eval"):
        assert counts(tmp_path, verb) == Counter(CELLS)


def test_a_run_that_fails_is_told_with_its_cause_stops_no_other_and_is_tried_again(whole, tmp_path):
    path = write_comparison(tmp_path)
    order = tell(tmp_path, "fail", CELLS[0], "out_of_memory")
    table, said = compare(path, status=Cause.OUT_OF_MEMORY.status)
    failure = "dypo seed 1: training failed: out_of_memory (status 71): told to fail"
    assert failure in said
    assert f"- Missing: {failure.replace('_', chr(92) + '_')}." in table
    assert "dypo: 1 of 2 seeds only." in table
    assert counts(tmp_path, "end eval") == Counter(CELLS[1:])
    order.unlink()
    assert run_here(path) == ([], whole[1].rstrip("\n") + "\n")
    assert counts(tmp_path, "begin train") == Counter({**dict.fromkeys(CELLS, 1), CELLS[0]: 2})


def test_an_evaluation_that_writes_nothing_is_a_failure_and_training_is_not_repeated(tmp_path):
    one = {"seeds": [1], "methods": {"grpo": {}}}
    ends, table = run_here(write_comparison(tmp_path, **one, eval_command=["true"]))
    assert "evaluation failed" in table
    assert "wrote nothing to" in ends[0]
    assert run_here(write_comparison(tmp_path, **one))[0] == []
    assert counts(tmp_path, "begin train") == Counter(["grpo/seed-1"])


def test_a_train_command_that_ends_well_without_a_run_that_is_done_is_a_failure(tmp_path):
    ends, _ = run_here(write_comparison(tmp_path, seeds=[1], methods={"grpo": {}}, train_command=["echo", "hello"]))
    assert "ended with status 0, but" in ends[0]
    assert "hello (see " in ends[0]


def test_a_train_command_that_is_killed_is_a_failure_that_names_its_last_words(tmp_path):
    words = ["bash", "-c", "echo at step 3; kill -9 $$"]
    ends, table = run_here(write_comparison(tmp_path, seeds=[1], methods={"grpo": {}}, train_command=words))
    assert "training failed: rank_lost (status 137): at step 3" in ends[0]
    assert "Missing: grpo seed 1" in table


def test_an_evaluation_that_fails_is_told_with_the_words_of_this_attempt_and_tried_again(tmp_path):
    one = {"seeds": [1], "methods": {"grpo": {}}}
    down = ["bash", "-c", "echo 'megatron-dypo: error: http://h: nothing answers there'; exit 69"]
    ends, table = run_here(write_comparison(tmp_path, **one, eval_command=down))
    assert "evaluation failed: servers_gone (status 69): http://h: nothing answers there (see " in ends[0]
    assert "Missing: grpo seed 1: evaluation failed: servers" in table
    ends, table = run_here(write_comparison(tmp_path, **one, eval_command=["bash", "-c", "kill -9 $$"]))
    assert "evaluation failed: rank_lost (status 137): it printed nothing (see " in ends[0]
    assert "| grpo | – | – | – |" in table
    assert run_here(write_comparison(tmp_path, **one))[0] == []
    assert counts(tmp_path, "begin train") == Counter(["grpo/seed-1"])


def test_items_that_never_came_for_one_method_are_said_below_the_table(tmp_path):
    path = write_comparison(tmp_path, methods={"dypo": {}, "grpo": {}}, seeds=[1])
    run_here(path)
    records = tmp_path / "out/cells/dypo/seed-1/eval/math.jsonl"
    records.write_text("".join(line for line in records.read_text().splitlines(True)[5:]))
    table = open_comparison(path).write()
    assert "dypo on math: 5 of 40 items left out" in table
    assert "grpo on math" not in table


def test_two_comparisons_at_once_run_no_cell_twice(tmp_path):
    path = write_comparison(tmp_path, seeds=[1])
    hold = tell(tmp_path, "hold", CELLS[0])
    first = start_compare(path)
    wait_until(lambda: journal_lines(tmp_path) != [], "the first cell is trained")
    table, said = compare(path, status=Cause.IN_USE.status)
    assert "dypo seed 1" in said
    assert "in use by process" in said
    assert "Missing: dypo seed 1: is being run" in table
    hold.unlink()
    first.communicate(timeout=120)
    assert first.returncode == 0
    assert counts(tmp_path, "begin train") == Counter(CELLS[:2])


def test_cells_of_other_settings_are_not_mixed_with_new_ones(tmp_path):
    run_here(write_comparison(tmp_path, seeds=[1], methods={"grpo": {"optimizer.lr": 1e-5}}))
    path = write_comparison(tmp_path, seeds=[1, 2], methods={"grpo": {"optimizer.lr": 2e-5}})
    with pytest.raises(ValueError, match=r"was made with other settings: optimizer\.lr: 1e-05 → 2e-05"):
        open_comparison(path)
    assert counts(tmp_path, "begin train") == Counter(["grpo/seed-1"])


def test_one_cell_alone_is_run_by_its_number(tmp_path):
    path = write_comparison(tmp_path)
    run_here(path, [2])
    assert counts(tmp_path, "end eval") == Counter(CELLS[2:3])
    assert open_comparison(path).describe()[1:3] == ["1: grpo seed 1: not run yet", "2: dypo seed 2: done"]
    _, said = compare(path, "--cell", "4", status=Cause.BAD_INPUT.status)
    assert "--cell=4: must be from 0 to 3" in said


def test_the_files_of_a_cell_are_a_config_to_train_and_the_sets_to_evaluate(whole):
    folder = whole[0] / "out" / "cells" / "dypo" / "seed-2"
    config, sets = load_config(folder / "config.yaml"), load_tree(EvalCommandConfig, folder / "eval.yaml")
    assert (config.run.seed, config.objective.name, sets.seed) == (2, "dypo", 2)
    assert (sets.eval, sets.rollout, sets.grading) == (config.eval, config.rollout, config.grading)


@pytest.mark.parametrize(("shared", "modes"), [(True, {0o755, 0o644}), (False, {0o700, 0o600})])
def test_files_of_a_comparison_are_private_unless_every_cell_shares_its_own(shared, modes, tmp_path):
    os.umask(0o022)
    methods = {name: {"run.shared_files": value} for name, value in (("grpo", True), ("dypo", shared))}
    compare(write_comparison(tmp_path, seeds=[1], methods=methods))
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*")} == modes
    cell = tmp_path / "out" / "cells" / "dypo" / "seed-1"
    assert load_tree(EvalCommandConfig, cell / "eval.yaml").shared_files is shared
