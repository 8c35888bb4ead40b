"""The verifier processes: a bad pair of any kind costs one sample."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import megatron_dypo.grading.workers.pool as pool_module
from megatron_dypo.config.grading import GradingConfig
from megatron_dypo.grading.verify import Verifier, grade, verdict_problem
from megatron_dypo.grading.workers.output import OutputTap
from megatron_dypo.grading.workers.process import WorkerProcess
from megatron_dypo.grading.workers.worker import Setup
from megatron_dypo.types import GradedGroup, Prompt, Rollout, RolloutGroup, Tier

HERE = "tests.support.grading.verifiers"
ROOT = Path(__file__).parents[3]


def _config(function: str = "obedient", **changes: Any) -> GradingConfig:
    return GradingConfig(**{"verifier": f"{HERE}:{function}", "workers": 2, "deadline_s": 1.0, **changes})


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(_config()) as running:
        yield running


class Bar:
    def __init__(self) -> None:
        self.count = 0.0

    def update(self, n: float | None = 1) -> None:
        self.count += n or 0


@pytest.mark.parametrize(
    ("response", "error"),
    [
        ("hang", "no verdict within deadline_s=1"),
        ("hang in C", "no verdict within deadline_s=1"),
        ("raise", "KeyError: 'no such unit' (verifiers.py:"),
        ("raise BaseException", "GeneratorExit: not even an Exception (verifiers.py:"),
        ("exit", "SystemExit: 3 (verifiers.py:"),
        ("interrupt", "KeyboardInterrupt: (verifiers.py:"),
        ("die", "verifier process killed by SIGKILL (often the kernel, for memory)"),
        ("leave", "verifier process exited with 7"),
    ],
)
def test_a_bad_pair_costs_one_sample_of_fifty(verifier: Verifier, response: str, error: str) -> None:
    bar, before, errors_before = Bar(), verifier.num_verified, verifier.num_errors
    pairs = [(str(i), str(i if i % 3 else -1)) for i in range(50)]
    pairs[17] = (response, "17")
    verdicts = verifier.verify(pairs, bar)
    assert [v.is_correct for v in verdicts] == [bool(i % 3) and i != 17 for i in range(50)]
    assert [i for i, v in enumerate(verdicts) if v.error] == [17]
    assert (verdicts[17].error or "").startswith(error)
    assert bar.count == 50
    assert (verifier.num_verified, verifier.num_errors) == (before + 49, errors_before + 1)
    assert verifier.last_error == verdicts[17].error


def test_many_bad_pairs_cost_themselves_only(verifier: Verifier) -> None:
    pairs = [("die" if i % 10 == 0 else "raise" if i % 10 == 5 else "x", "x") for i in range(120)]
    verdicts = verifier.verify(pairs)
    assert [v.is_correct for v in verdicts] == [response == "x" for response, _ in pairs]
    assert sum(v.error is not None for v in verdicts) == 24


def test_an_error_that_comes_again_is_logged_once_with_a_count(caplog: pytest.LogCaptureFixture) -> None:
    bad, good = [("raise", "17")] * 4, [("a", "a")]
    with caplog.at_level(logging.WARNING), Verifier(_config(workers=1)) as verifier:
        for _ in range(4):
            verifier.verify([*bad, *good])
        verifier.verify([("exit", "x")])
    heads = [record.getMessage().split(" (verifiers.py")[0] for record in caplog.records]
    assert heads == [
        "no verdict on 4 of 5 responses (4 since the start): KeyError: 'no such unit'",
        "no verdict on 4 of 5 responses (12 since the start): KeyError: 'no such unit'",
        "no verdict on 1 of 1 response (1 since the start): SystemExit: 3",
    ]
    assert caplog.records[0].getMessage().endswith("; answer '17'; response ends 'raise'")


def test_no_pairs_are_no_verdicts(verifier: Verifier) -> None:
    assert verifier.verify([]) == []


def test_processes_live_on_between_calls_and_share_the_work() -> None:
    with Verifier(_config("pid")) as verifier:
        seen = [{v.reward for v in verifier.verify([("", "")] * 400)} for _ in range(2)]
    assert seen[0] == seen[1]
    assert len(seen[0]) == 2


def test_a_process_that_dies_while_idle_costs_nothing() -> None:
    with Verifier(_config("pid", workers=1)) as verifier:
        (before,) = verifier.verify([("", "")])
        os.kill(int(before.reward), signal.SIGKILL)
        _await_end(int(before.reward))
        after = verifier.verify([("", "")] * 5)
    assert all(v.error is None for v in after)
    assert before.reward not in {v.reward for v in after}


class _Late:
    """A connection on which a message comes just after the first look."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._looks = connection, 0
        self.recv_bytes, self.send, self.close, self.fileno = (
            connection.recv_bytes,
            connection.send,
            connection.close,
            connection.fileno,
        )

    def poll(self, timeout_s: float = 0.0) -> bool:
        self._looks += 1
        return self._connection.poll(None) and self._looks > 1


class _LateProcess(WorkerProcess):
    def __init__(self, setup: Setup, tap: OutputTap) -> None:
        super().__init__(setup, tap)
        self.connection = _Late(self.connection)  # type: ignore[assignment]


def test_a_process_that_is_ready_between_two_looks_is_not_taken_for_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    with Verifier(_config(workers=1)) as verifier:
        monkeypatch.setattr(pool_module, "WorkerProcess", _LateProcess)  # the process that replaces the first
        dead, verdict = verifier.verify([("die", "die"), ("x", "x")])
    assert "killed by SIGKILL" in (dead.error or "")
    assert verdict.is_correct


def test_results_become_correctness_and_reward() -> None:
    expected = {
        "true": (True, 1.0),
        "numpy": (True, 1.0),
        "one": (True, 1.0),
        "almost": (True, 1.0),
        "half": (False, 0.5),
        "more": (True, 1.5),
        "shaped": (True, 0.25),
        "wrong but tidy": (False, 0.1),
        "bare": (True, 1.0),
    }
    refused = ("nan", "text", "number in dict", "none")
    with Verifier(_config("returns")) as verifier:
        verdicts = verifier.verify([(kind, "") for kind in (*expected, *refused)])
    assert [(v.is_correct, v.reward) for v in verdicts] == [*expected.values(), *[(False, 0.0)] * len(refused)]
    assert [v.error is not None for v in verdicts] == [False] * len(expected) + [True] * len(refused)
    assert verdicts[-1].error == "TypeError: the verifier returned None (NoneType): must be a bool, a number or a dict"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no.such.module:f", r"'no\.such\.module:f': cannot import no\.such\.module: No module named 'no'"),
        (f"{HERE}:nothing", "has no 'nothing'"),
        (f"{HERE}:NOT_A_FUNCTION", "has no function 'NOT_A_FUNCTION'"),
        (f"{HERE}:wants_more", "function wants_more: its parameter 'threshold' has no default and is none of answer"),
        ("tests.support.grading.raises_on_import:f", r"RuntimeError: the licence .* \(raises_on_import.py:3\)"),
        ("tests.support.grading.dies_on_import:f", "died while importing it: verifier process exited with 5"),
    ],
)
def test_a_verifier_that_does_not_import_is_an_error_at_start(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught, Verifier(GradingConfig(verifier=path)):
        pass
    assert str(caught.value).startswith(f"grading.verifier={path!r}: ")


def test_a_verifier_is_used_in_a_with_block() -> None:
    with pytest.raises(RuntimeError, match="with"):
        Verifier(_config()).verify([("a", "b")])


def test_no_process_outlives_a_killed_trainer() -> None:
    code = (
        "import sys\n"
        "from megatron_dypo.config.grading import GradingConfig\n"
        "from megatron_dypo.grading.verify import Verifier\n"
        "config = GradingConfig(verifier='tests.support.grading.verifiers:pid', workers=1, deadline_s=1.0)\n"
        "with Verifier(config) as verifier:\n"
        "    print(int(verifier.verify([('', '')])[0].reward), flush=True)\n"
        "    sys.stdin.read()\n"
    )
    trainer = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None
    worker = int(trainer.stdout.readline())
    trainer.kill()
    trainer.communicate()
    _await_end(worker)


def _await_end(pid: int) -> None:
    deadline = time.monotonic() + 20
    while _is_running(pid):
        assert time.monotonic() < deadline, f"the verifier process {pid} is still running"
        os.sched_yield()


def _is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_module_beside_the_run_is_found(tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text("def score(response, answer):\n    return len(response) == int(answer)\n")
    code = (
        "import sys; sys.path.remove('')\n"  # as in a console script
        "from megatron_dypo.config.grading import GradingConfig\n"
        "from megatron_dypo.grading.verify import Verifier\n"
        "with Verifier(GradingConfig(verifier='my_rewards:score')) as v:\n"
        "    print(v.verify([('abc', '3')])[0].is_correct)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == "True\n"


def _group(answer: str, *rollouts: tuple[str, str]) -> RolloutGroup:
    nothing = np.zeros(0, np.int32)
    prompt = Prompt(prompt_id=answer, visit=0, order=0, tokens=nothing, text="", answer=answer, source="")
    return RolloutGroup(
        prompt=prompt,
        rollouts=tuple(
            Rollout(tokens=nothing, logp=nothing.astype(np.float32), text=text, finish=finish, policy_version=0)  # type: ignore[arg-type]
            for text, finish in rollouts
        ),
    )


def _grade(groups: list[RolloutGroup], verifier: Verifier, fail_truncated: bool = True) -> list[GradedGroup]:
    return grade(groups, verifier, fail_truncated=fail_truncated, show_progress=False)


def test_groups_are_graded_in_order_and_truncated_rollouts_are_wrong(verifier: Verifier) -> None:
    groups = [
        _group("1", ("1", "stop"), ("1", "stop")),
        _group("2", ("2", "length"), ("2", "stop")),
        _group("3", ("die", "length"), ("no", "stop")),
        _group("4"),
    ]
    graded = _grade(groups, verifier)
    assert [g.prompt for g in graded] == [g.prompt for g in groups]
    assert [g.tier for g in graded] == [Tier.EASY, Tier.MID, Tier.HARD, None]
    assert [[v.is_correct for v in g.verdicts] for g in graded] == [[True] * 2, [False, True], [False] * 2, []]
    # The truncated "die" was never given to the verifier.
    assert [v.error for v in graded[2].verdicts] == [None, None]
    lenient = _grade(groups[1:2], verifier, fail_truncated=False)
    assert lenient[0].tier is Tier.EASY


def test_a_group_with_a_rollout_without_a_verdict_has_no_tier(verifier: Verifier) -> None:
    right, wrong, none = ("5", "stop"), ("no", "stop"), ("raise", "stop")
    groups = [_group("5", right, right, right, none), _group("5", wrong, none), _group("5", none, none)]
    graded = _grade([*groups, _group("5", right, wrong), _group("5")], verifier)
    assert [g.tier for g in graded] == [None, None, None, Tier.MID, None]
    assert [v.is_correct for v in graded[0].verdicts] == [True, True, True, False]
    problems = [verdict_problem(g) for g in graded]
    assert all((problem or "").startswith("KeyError: 'no such unit'") for problem in problems[:3])
    assert problems[3:] == [None, None]


def test_a_round_without_any_verdict_can_be_told_by_the_counts() -> None:
    with Verifier(_config(workers=1)) as verifier:
        graded = _grade([_group("1", ("raise", "stop"), ("exit", "stop"))] * 2, verifier)
        assert (verifier.num_verified, verifier.num_errors) == (0, 4)
        assert (verifier.last_error or "").startswith("SystemExit: 3")
    assert {g.tier for g in graded} == {None}


def test_an_error_of_a_built_in_verifier_names_no_place_in_our_code() -> None:
    with Verifier(GradingConfig(verifier="choice", workers=1)) as running:
        (verdict,) = running.verify([("Answer: B", "Z")])
    assert verdict.error == "ValueError: answer='Z': must be one letter from A to J, or one digit from 1 to 9"
