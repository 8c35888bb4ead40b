"""The script of the tiny study goes on from any end and does nothing twice. Its cells' commands are stand-ins."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil
import pytest

from megatron_dypo.ending import Cause
from tests.support.study.comparisons import journal_lines, tell, wait_until
from tests.support.study.fake_study import write_plan

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "examples" / "tiny_study" / "run.py"
RATES = ("0.001", "0.01", "0.1")
TUNING = [f"{method}.lr{rate}/seed-100" for method in ("dypo", "grpo") for rate in RATES]
FINAL = [f"{method}/seed-{seed}" for seed in (1, 2) for method in ("dypo", "grpo", "dypo_again")]
DEADLINE_S = 600.0


def start(plan: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(plan)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == status, output
    return output


def end_in_the_middle(plan: Path, cell: str, number: signal.Signals) -> None:
    """Run the script, end it while a cell is trained, and wait until all that it has started is gone."""
    hold = tell(plan.parent, "hold", cell)
    process = start(plan)
    is_there = f"begin train {cell}"
    wait_until(lambda: is_there in journal_lines(plan.parent) or process.poll() is not None, cell, DEADLINE_S)
    assert process.poll() is None, process.communicate()[0]
    running = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    finish(process, -9 if number == signal.SIGKILL else Cause.STOPPED.status)
    gone, alive = psutil.wait_procs(running, timeout=DEADLINE_S)
    assert gone
    assert not alive
    hold.unlink()


def counts(folder: Path, verb: str) -> Counter[str]:
    return Counter(line.removeprefix(f"{verb} ") for line in journal_lines(folder) if line.startswith(f"{verb} "))


@pytest.mark.slow
def test_a_study_that_is_stopped_and_killed_chooses_rates_and_runs_no_cell_twice(tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    tell(tmp_path, "fail", TUNING[3], "not_finite")  # the smallest rate of grpo diverges
    end_in_the_middle(plan, TUNING[1], signal.SIGTERM)
    end_in_the_middle(plan, FINAL[1], signal.SIGKILL)
    finish(start(plan))
    trained = Counter({**dict.fromkeys([*TUNING, *FINAL], 1), TUNING[1]: 2, FINAL[1]: 2})
    assert counts(tmp_path, "begin train") == trained
    done = set(TUNING) - {TUNING[3]} | set(FINAL)
    assert counts(tmp_path, "begin eval") == counts(tmp_path, "end train") == Counter(done)
    results = json.loads((tmp_path / "docs" / "fake" / "results.json").read_text())
    (found,) = results["tasks"].values()
    assert found["rates"] == {"dypo": 0.01, "grpo": 0.01}, "of two rates that tie the smaller one"
    assert found["rollouts"] == dict.fromkeys(("dypo", "grpo", "dypo_again"), 3 * 16 * 8.0)
    page = (tmp_path / "docs" / "fake.md").read_text()
    assert re.search(r"\| grpo \| ([\d.]+) \| diverged \| \*\*\1\*\* \|", page)
    assert "has not been run" not in page
    assert (tmp_path / "docs" / "fake" / "additions.svg").read_text().count("<path") >= 2
    again = {path.name: path.read_bytes() for path in (tmp_path / "docs" / "fake").iterdir()}
    finish(start(plan))
    assert counts(tmp_path, "begin train") == trained
    assert {path.name: path.read_bytes() for path in (tmp_path / "docs" / "fake").iterdir()} == again


def over_steps(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT.with_name("over_steps.py")), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_metric_over_the_steps_is_a_mean_over_the_seeds_of_each_method(tmp_path: Path) -> None:
    plan = ("--plan", str(write_plan(tmp_path)))
    finish(start(Path(plan[1])))
    found = over_steps("train/grad_norm", "dypo", "grpo", "--parts=2", *plan)
    rows = [f"| {name} | 1.500 [1.500, 1.500] | 3.000 [3.000, 3.000] |" for name in ("dypo", "grpo")]
    assert found.stdout.splitlines() == ["| train/grad_norm | steps 1 to 2 | steps 3 to 3 |", "|---|---|---|", *rows]
    assert "error: dipo: no finished run of that name" in over_steps("train/grad_norm", "dipo", *plan).stderr
    assert "error: gal/etta: no run of dypo has this metric" in over_steps("gal/etta", "dypo", *plan).stderr


def archive(verb: str, plan: Path) -> None:
    command = [sys.executable, str(SCRIPT.with_name("archive.py")), verb, str(plan)]
    finish(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))


@pytest.mark.slow
def test_another_checkout_goes_on_from_an_archive_and_finds_the_same(tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    tell(tmp_path, "fail", TUNING[3], "not_finite")
    end_in_the_middle(plan, FINAL[1], signal.SIGKILL)
    archive("pack", plan)
    stages = (tmp_path / "out" / "stages.json").read_text()
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stages.json").write_text(stages)  # that the inputs are made
    archive("unpack", plan)
    finish(start(plan))
    trained = Counter({**dict.fromkeys([*TUNING, *FINAL], 1), FINAL[1]: 2})
    assert counts(tmp_path, "begin train") == trained
    results = json.loads((tmp_path / "docs" / "fake" / "results.json").read_text())
    (tmp_path / "whole").mkdir()
    whole = write_plan(tmp_path / "whole")
    tell(tmp_path / "whole", "fail", TUNING[3], "not_finite")
    finish(start(whole))
    expected = json.loads((tmp_path / "whole" / "docs" / "fake" / "results.json").read_text())
    assert results["tasks"] == expected["tasks"]


def test_a_failure_that_is_no_result_ends_the_study_with_its_status(tmp_path: Path) -> None:
    plan = write_plan(tmp_path, learning_rates=[0.01], seeds=[1])
    order = tell(tmp_path, "fail", FINAL[1], "out_of_memory")
    assert "out_of_memory" in finish(start(plan), Cause.OUT_OF_MEMORY.status)
    assert not (tmp_path / "docs").exists()
    order.unlink()
    finish(start(plan))
    assert counts(tmp_path, "begin train") == Counter({**dict.fromkeys(FINAL[:3], 1), FINAL[1]: 2})


def test_a_server_whose_port_is_taken_ends_the_study_before_its_first_cell(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        plan = write_plan(tmp_path, keep_server=True, server_port=port)
        output = finish(start(plan), 1)
    assert f"port {port} of 127.0.0.1 is taken" in output
    assert journal_lines(tmp_path) == []
