"""The verifier processes: one bad pair costs one sample, whatever it does."""

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

import numpy as np
import pytest

from megatron_dypo.config.grading import GradingConfig
from megatron_dypo.grading.verify import Verifier, grade
from megatron_dypo.types import Prompt, Rollout, RolloutGroup, Tier

HERE = "tests.unit.grading.verifiers"
ROOT = Path(__file__).parents[3]


def _config(function: str = "obedient", **changes: object) -> GradingConfig:
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
        ("raise", "KeyError: 'no such unit'"),
        ("raise BaseException", "GeneratorExit: not even an Exception"),
        ("exit", "SystemExit: 3"),
        ("die", "verifier process killed by SIGKILL"),
        ("leave", "verifier process exited with 7"),
    ],
)
def test_a_bad_pair_costs_one_sample_of_fifty(
    verifier: Verifier, caplog: pytest.LogCaptureFixture, response: str, error: str
) -> None:
    bar, errors_before = Bar(), verifier.num_errors
    pairs = [(str(i), str(i if i % 3 else -1)) for i in range(50)]
    pairs[17] = (response, "17")
    start = time.monotonic()
    with caplog.at_level(logging.WARNING):
        verdicts = verifier.verify(pairs, bar)
    # The deadline, a new process (its import included) and slack for a busy machine.
    assert time.monotonic() - start < 30
    assert [v.is_correct for v in verdicts] == [bool(i % 3) and i != 17 for i in range(50)]
    assert [i for i, v in enumerate(verdicts) if v.error] == [17]
    assert verdicts[17].error == error
    assert bar.count == 50
    assert verifier.num_errors == errors_before + 1
    (record,) = caplog.records
    assert record.getMessage() == f"verifier failed: {error}; answer '17'; response ends {response!r}"


def test_many_bad_pairs_cost_themselves_only(verifier: Verifier, caplog: pytest.LogCaptureFixture) -> None:
    pairs = [("die" if i % 10 == 0 else "raise" if i % 10 == 5 else "x", "x") for i in range(120)]
    with caplog.at_level(logging.WARNING):
        verdicts = verifier.verify(pairs)
    assert [v.is_correct for v in verdicts] == [response == "x" for response, _ in pairs]
    assert sum(v.error is not None for v in verdicts) == 24
    assert caplog.records[-1].getMessage() == "verifier failed on 14 more of 120"


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
        self.recv, self.send, self.close, self.fileno = (
            connection.recv,
            connection.send,
            connection.close,
            connection.fileno,
        )

    def poll(self, timeout_s: float = 0.0) -> bool:
        self._looks += 1
        return self._connection.poll(None) and self._looks > 1


def test_a_process_that_is_ready_between_two_looks_is_not_taken_for_a_verdict() -> None:
    with Verifier(_config(workers=1)) as verifier:
        (first,) = verifier._workers
        first.stop()
        second = verifier._new_worker()
        second.connection = _Late(second.connection)
        verifier._workers = [second]
        (verdict,) = verifier.verify([("x", "x")])
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
    assert verdicts[-1].error == "TypeError: the verifier returned None: must be a bool, a number or a dict"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no.such.module:f", r"'no\.such\.module:f': cannot import no\.such\.module: No module named 'no'"),
        (f"{HERE}:nothing", "has no function 'nothing'"),
        (f"{HERE}:NOT_A_FUNCTION", "has no function 'NOT_A_FUNCTION'"),
        ("tests.unit.grading.raises_on_import:f", "died while importing it: verifier process exited with 1"),
        (f"{HERE}:", "must look like pkg.module:function"),
        (":f", "must look like pkg.module:function"),
    ],
)
def test_a_bad_import_path_is_an_error_at_start(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught, Verifier(GradingConfig(verifier=path)):
        pass
    assert str(caught.value).startswith(f"grading.verifier={path!r}: ")


def test_a_verifier_is_used_in_a_with_block() -> None:
    with pytest.raises(RuntimeError, match="with"):
        Verifier(_config()).verify([("a", "b")])


def test_no_process_outlives_a_killed_trainer() -> None:
    code = (
        "import sys\n"
        "from tests.unit.grading.test_verify import Verifier, _config\n"
        "with Verifier(_config('pid', workers=1)) as verifier:\n"
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
        "import sys; sys.path.remove('')\n"  # as under a console script
        "from megatron_dypo.config.tree import GradingConfig\n"
        "from megatron_dypo.grading.verify import Verifier\n"
        "with Verifier(GradingConfig(verifier='my_rewards:score')) as v: print(v.verify([('abc', '3')])[0].is_correct)\n"
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


def test_groups_are_graded_in_order_and_truncated_rollouts_are_wrong(verifier: Verifier) -> None:
    groups = [
        _group("1", ("1", "stop"), ("1", "stop")),
        _group("2", ("2", "length"), ("2", "stop")),
        _group("3", ("die", "length"), ("no", "stop")),
        _group("4"),
        _group("5", ("5", "stop"), ("raise", "stop")),
    ]
    graded = grade(groups, verifier, truncated_is_wrong=True, show_progress=False)
    assert [g.prompt for g in graded] == [g.prompt for g in groups]
    assert [g.tier for g in graded] == [Tier.EASY, Tier.MID, Tier.HARD, None, Tier.MID]
    assert [[v.is_correct for v in g.verdicts] for g in graded] == [
        [True] * 2,
        [False, True],
        [False] * 2,
        [],
        [True, False],
    ]
    # The truncated "die" was never given to the verifier.
    assert [v.error for v in graded[2].verdicts] == [None, None]
    assert graded[4].verdicts[1].error is not None
    lenient = grade(groups[1:2], verifier, truncated_is_wrong=False, show_progress=False)
    assert lenient[0].tier is Tier.EASY
