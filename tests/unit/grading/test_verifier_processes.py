"""Anything that a verifier does to its process costs no other pair, and no pair gets another pair's verdict."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dypo.config.grading import GradingConfig
from megatron_dypo.grading.pairs import Pair
from megatron_dypo.grading.verify import Verifier
from megatron_dypo.types import Verdict

HERE = "tests.support.grading.verifiers"
RIGHT, WRONG = Verdict(is_correct=True, reward=1.0), Verdict(is_correct=False, reward=0.0)


def _config(function: str, **changes: Any) -> GradingConfig:
    return GradingConfig(**{"verifier": f"{HERE}:{function}", "workers": 1, "deadline_s": 1.0, **changes})


@pytest.fixture(scope="module")
def strange() -> Iterator[Verifier]:
    with Verifier(_config("strange")) as running:
        yield running


@pytest.mark.parametrize(
    ("response", "error"),
    [
        ("fork and die", "verifier process exited with 9"),
        ("large result", "TypeError: the verifier returned 'yyyy"),
        ("bad repr", "TypeError: the verifier returned <_Unprintable instance at"),
        ("bad message", "_UnprintableError: its message cannot be shown, RuntimeError (verifiers.py:"),
        ("surrogate", "ValueError: \\ud83d second line \\x1b[31m (verifiers.py:"),
        ("late", "no verdict within deadline_s=1"),
        ("close", "verifier process exited with"),
        ("segfault", "verifier process killed by SIGSEGV"),
    ],
)
def test_a_strange_pair_costs_itself_only(strange: Verifier, response: str, error: str) -> None:
    verdicts = strange.verify([("a", "a"), ("a", "b"), (response, "x"), ("b", "b"), ("b", "a")])
    assert (verdicts[2].error or "")[: len(error)] == error
    assert len(verdicts[2].error or "") <= 500
    assert [verdicts[i] for i in (0, 1, 3, 4)] == [RIGHT, WRONG, RIGHT, WRONG]


def test_a_verifier_that_forks_answers_once(strange: Verifier) -> None:
    pairs = [(text, answer) for i in range(6) for text, answer in (("fork", "x"), (str(i), str(i)), (str(i), "longer"))]
    verdicts = strange.verify(pairs)
    assert all(verdict.error is None for verdict in verdicts)
    assert [verdict.is_correct for verdict in verdicts] == [
        text in (answer, str(len(answer))) for text, answer in pairs
    ]


def test_children_of_a_verifier_that_ended_are_killed(strange: Verifier) -> None:
    before = _children_of_groups()
    strange.verify([("fork and die", "x")])
    deadline = time.monotonic() + 20
    while len(_children_of_groups()) > len(before):
        assert time.monotonic() < deadline, "a child of a verifier still runs"
        os.sched_yield()


def _children_of_groups() -> list[int]:
    """Return the processes that run this module's verifiers."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, state = (folder / "cmdline").read_bytes(), (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if b"grading.workers.worker import main" in command and state[0] != "Z":
            found.append(int(folder.name))
    return found


def test_a_verifier_that_changes_the_directory_changes_it_for_itself(strange: Verifier) -> None:
    here = Path.cwd()
    assert strange.verify([("move", "move"), ("where", ""), ("move", "x"), ("where", "")]) == [
        RIGHT,
        RIGHT,
        WRONG,
        RIGHT,
    ]
    assert Path.cwd() == here


def test_a_verifier_that_prints_without_end_is_cut_and_judged(capfd: pytest.CaptureFixture[str]) -> None:
    with Verifier(_config("strange", deadline_s=60.0)) as verifier:
        assert verifier.verify([("print", "print"), ("a", "a")]) == [RIGHT, RIGHT]
    out, err = capfd.readouterr()
    assert out == ""
    assert 65536 <= len(err) < 66000
    assert err.count("[what verifiers print beyond 65536 bytes is not shown]") == 1


def test_a_large_answer_and_a_response_with_lone_surrogates_are_judged(
    strange: Verifier, caplog: pytest.LogCaptureFixture
) -> None:
    large = "z" * 10**7
    pairs = [(large, large), (str(10**7), large), ("\ud83d", "\ud83d"), ("\ud83d", "x")]
    assert strange.verify(pairs) == [RIGHT, RIGHT, RIGHT, WRONG]
    caplog.clear()
    strange.verify([("bad repr", large)])
    assert sum(len(record.getMessage()) for record in caplog.records) < 2000


@pytest.mark.parametrize("verifier", ["math", "exact", "choice"])
def test_a_response_with_lone_surrogates_has_a_verdict_of_a_built_in_verifier(verifier: str) -> None:
    with Verifier(GradingConfig(verifier=verifier, workers=1)) as running:
        verdicts = running.verify([("\ud83d \\boxed{\ud83d}", "A"), ("\ud83d so \\boxed{A}", "A")])
    assert verdicts == [WRONG, RIGHT]


class _Unpicklable:
    def __reduce__(self) -> Any:
        raise RuntimeError("stays here")


class _UnknownThere:
    """An error whose class only the trainer can find."""


_UnknownThere.__module__ = "no_such_module"


def test_an_answer_that_cannot_be_sent_costs_itself_only(strange: Verifier) -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    answers: list[Any] = [_Unpicklable(), nested, _UnknownThere(), (lambda: 0), "a", {"b": np.arange(3)}, {"c"}]
    errors = [verdict.error for verdict in strange.verify([("a", answer) for answer in answers])]
    # Take it apart without recursion, which would end this process.
    while nested:
        nested = nested.pop()
    assert "RuntimeError: stays here" in (errors[0] or "")
    assert (errors[1] or "").startswith("cannot be sent to the verifier: RecursionError")
    assert all((error or "").startswith("cannot be sent to the verifier: ") for error in errors[:4])
    assert errors[4:] == [None, None, None]


def test_a_verifier_that_hangs_on_all_pairs_holds_a_call_for_ten_deadlines_at_most() -> None:
    with Verifier(_config("hangs_always", deadline_s=0.05, workers=2)) as verifier:
        verdicts = verifier.verify([("a", "a")] * 400)
    assert all(verdict.error for verdict in verdicts)
    assert verdicts[-1].error == (
        "not tried: no verdict within 10 × deadline_s, the last error: no verdict within deadline_s=0.05"
    )
    assert verifier.num_errors == 400


def test_a_process_that_is_stopped_does_not_hold_up_a_large_batch() -> None:
    with Verifier(_config("pid")) as verifier:
        (first,) = verifier.verify([("", "")])
        os.kill(int(first.reward), signal.SIGSTOP)
        (second,) = verifier.verify([("x" * 10**7, "")])
    assert second.error is None
    assert second.reward != first.reward
    assert verifier.num_replaced == 1


def test_a_call_that_breaks_off_leaves_no_process_with_its_pairs() -> None:
    class Stop(BaseException):
        pass

    class Bar:
        def update(self, n: float | None = 1) -> None:
            raise Stop

    with Verifier(_config("strange", workers=2)) as verifier:
        with pytest.raises(Stop):
            verifier.verify([("a", "a")] * 100, Bar())
        with pytest.raises(RuntimeError, match="not running"):
            verifier.verify([("b", "a")])


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_each_pair_has_its_own_verdict_whatever_the_others_do(seed: int) -> None:
    rng = np.random.default_rng(seed)
    bad = ["fork", "fork and die", "move", "bad repr", "surrogate", "close", "segfault"]
    count = 300 if seed == 0 else 3000
    pairs = []
    for i in range(count):
        text = bad[rng.integers(len(bad))] if rng.random() < 0.05 else str(i)
        pairs.append((text, str(i) if rng.random() < 0.5 else "other answer"))
    with Verifier(_config("strange", workers=2, deadline_s=10.0)) as verifier:
        verdicts = verifier.verify(pairs)
    lost = {"fork and die", "bad repr", "surrogate", "close", "segfault"}
    assert [verdict.error is not None for verdict in verdicts] == [text in lost for text, _ in pairs]
    expected = [text in (answer, str(len(answer))) for text, answer in pairs]
    assert [verdict.is_correct for verdict in verdicts] == expected


def test_only_what_a_verifier_asks_for_travels_to_it() -> None:
    row = {"large": functools.partial(print), "own": (lambda: 0)}  # these values could not be sent
    with Verifier(_config("strange")) as verifier:
        assert verifier.verify([Pair(response="a", answer="a", row=row)]) == [RIGHT]


def test_threads_that_verify_at_the_same_time_get_their_own_verdicts() -> None:
    with Verifier(_config("strange", workers=2)) as verifier, ThreadPoolExecutor(4) as threads:
        calls = [[(f"{call} {i}", f"{call} {i if i % (call + 2) else -1}") for i in range(30)] for call in range(4)]
        found = list(threads.map(verifier.verify, calls))
    for call, verdicts in enumerate(found):
        assert [verdict.is_correct for verdict in verdicts] == [bool(i % (call + 2)) for i in range(30)]


def test_a_verifier_of_a_thousand_different_errors_is_not_a_thousand_lines(caplog: pytest.LogCaptureFixture) -> None:
    with Verifier(_config("raises_its_response")) as verifier:
        for call in range(10):
            verifier.verify([(f"{call} {i}", "") for i in range(100)])
    assert len([record for record in caplog.records if "no verdict on" in record.getMessage()]) == 2
