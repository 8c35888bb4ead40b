"""Asynchronous and batched verifiers: a bad pair costs no other pair that is judged together with it."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_dypo.config.grading import GradingConfig
from megatron_dypo.grading.verify import Verifier
from megatron_dypo.types import Verdict

HERE = "tests.support.grading.verifiers"
RIGHT, WRONG = Verdict(is_correct=True, reward=1.0), Verdict(is_correct=False, reward=0.0)


def _config(function: str, **changes: Any) -> GradingConfig:
    return GradingConfig(**{"verifier": f"{HERE}:{function}", "workers": 1, "deadline_s": 1.0, **changes})


def test_asynchronous_verifications_run_at_the_same_time_each_with_its_deadline() -> None:
    with Verifier(_config("asynchronous")) as verifier:
        verdicts = verifier.verify([("wait", ""), ("meet", ""), ("a", "a"), ("meet", ""), ("exit", ""), ("raise", "")])
        assert [verdict.is_correct for verdict in verdicts] == [False, True, True, True, False, False]
        heads = [(verdict.error or "").split(" (")[0] for verdict in verdicts]
        assert heads == ["no verdict within deadline_s=1", "", "", "", "SystemExit: 3", "KeyError: 'no such unit'"]
        assert verifier.verify([("a", "a")]) == [RIGHT]


@pytest.mark.parametrize("function", ["asynchronous", "batched"])
@pytest.mark.parametrize("bad", ["hang", "die", "raise"])
def test_of_pairs_that_are_judged_together_the_bad_one_alone_is_lost(function: str, bad: str) -> None:
    pairs = [(str(i), str(i if i % 2 else -1)) for i in range(6)]
    pairs[3] = (bad, "3")
    with Verifier(_config(function)) as verifier:
        verdicts = verifier.verify(pairs)
    assert [i for i, verdict in enumerate(verdicts) if verdict.error] == [3]
    assert [verdict.is_correct for verdict in verdicts] == [bool(i % 2) and i != 3 for i in range(6)]


def test_a_batched_verifier_gets_lists_of_at_most_batch_size() -> None:
    with Verifier(_config("batched", batch_size=4, workers=2)) as verifier:
        sizes = [verdict.reward for verdict in verifier.verify([("a", "a")] * 10)]
        few = [verdict.reward for verdict in verifier.verify([("a", "a")] * 4)]
    assert sorted(sizes) == [2.0] * 2 + [4.0] * 8
    assert few == [2.0] * 4


def test_one_bad_result_of_a_batch_is_one_error_and_a_wrong_number_of_results_is_named() -> None:
    with Verifier(_config("batched")) as verifier:
        bad_reward, good = verifier.verify([("nan", "nan"), ("a", "a")])
        too_few, alone = verifier.verify([("too few", ""), ("a", "a")])
    assert "reward must be a number of at most 1e+06 in size" in (bad_reward.error or "")
    assert (good.is_correct, good.reward) == (True, 2.0)
    assert too_few.error == "ValueError: the verifier returned 0 results for 1 response: must be one for each"
    assert (alone.is_correct, alone.reward) == (True, 1.0)


def test_a_decorated_asynchronous_function_is_awaited() -> None:
    with Verifier(_config("hidden_async")) as verifier:
        assert verifier.verify([("a", "a"), ("b", "a")]) == [RIGHT, WRONG]


def test_an_asynchronous_verifier_that_blocks_until_after_the_deadline_gives_no_verdict() -> None:
    with Verifier(_config("asynchronous", deadline_s=0.3)) as verifier:
        late, good = verifier.verify([("block", ""), ("a", "a")])
    assert late.error == "no verdict within deadline_s=0.3"
    assert good == RIGHT
