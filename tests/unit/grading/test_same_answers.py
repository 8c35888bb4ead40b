"""The verifiers on hand-judged pairs, on the golds of published sets, and on texts that take long."""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import pytest

from megatron_dypo.config.grading import GradingConfig
from megatron_dypo.grading.answers.extract import gold_text
from megatron_dypo.grading.choice import verify_choice
from megatron_dypo.grading.math import verify_math
from megatron_dypo.grading.verify import Verifier
from megatron_dypo.grading.workers.judging import MAX_PROCESSOR_S
from tests.support.grading.equivalent_pairs import ENDLESS, MISSES, PAIRS, PATHOLOGICAL, Pair, response
from tests.support.grading.verifier_cases import PAGE, VERIFIERS
from tests.support.grading.verifiers import spin
from tests.support.public_data import public_rows

START_PROCESSOR_S = 15.0
"""Upper bound of the processor time that a verifier process needs for its imports."""
MATH_FILES = (
    "aime24.jsonl",
    "aime25.jsonl",
    "amc23_83.jsonl",
    "math500_test.jsonl",
    "gsm8k_test.jsonl",
    "gsm8k_train.jsonl",
)


def verdict(verifier: str, pair: Pair) -> tuple[bool, float]:
    """Return the verdict on a pair, and its processor time."""
    gold, claim, _ = pair
    start = time.process_time()
    is_correct = VERIFIERS[verifier](response(verifier, claim), gold)
    return is_correct, time.process_time() - start


def test_at_least_98_of_100_of_200_hand_judged_pairs_are_right_and_each_miss_is_on_the_page() -> None:
    assert len({(verifier, gold, claim) for verifier, (gold, claim, _) in PAIRS}) == len(PAIRS) >= 200
    wrong = set()
    for verifier, pair in PAIRS:
        is_correct, seconds = verdict(verifier, pair)
        assert seconds <= MAX_PROCESSOR_S, pair
        if is_correct is not pair[2]:
            wrong.add(pair[:2])
    assert wrong == MISSES
    assert len(MISSES) <= 0.02 * len(PAIRS)
    page = PAGE.read_text(encoding="utf-8")
    assert [miss for miss in MISSES if f"| `{miss[0]}` | `{miss[1]}` |" not in page] == []


def test_no_pair_that_differs_is_called_the_same() -> None:
    refused = {(gold, claim) for _, (gold, claim, is_same) in PAIRS if not is_same}
    assert len(refused) >= 80
    assert not MISSES & refused


@pytest.mark.parametrize("name", MATH_FILES)
def test_each_gold_of_a_published_set_is_right_by_itself(name: str) -> None:
    wrong, slowest = [], 0.0
    for row in public_rows(name):
        start = time.process_time()
        if not verify_math(f"Therefore the answer is $\\boxed{{{gold_text(row['answer'])}}}$.", row["answer"]):
            wrong.append(row["answer"])
        slowest = max(slowest, time.process_time() - start)
    assert wrong == []
    assert slowest <= MAX_PROCESSOR_S


def test_each_gold_of_arc_is_right_by_itself_and_no_other_label_is() -> None:
    for row in public_rows("arc_c.parquet"):
        gold = row["reward_model"]["ground_truth"]
        labels = "12345" if gold.isdigit() else "ABCDE"
        assert [label for label in labels if verify_choice(f"\\boxed{{{label}}}", gold)] == [gold]


def test_a_verdict_on_a_text_that_is_long_or_deep_takes_at_most_two_seconds_of_processor_time() -> None:
    for text, gold in PATHOLOGICAL:
        start = time.process_time()
        verify_math(text, gold)
        assert time.process_time() - start <= MAX_PROCESSOR_S, text[:60]


def test_what_never_ends_costs_at_most_two_seconds_of_processor_time_whatever_the_deadline() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with Verifier(GradingConfig(workers=1, deadline_s=300.0)) as verifier:
        ((good, *verdicts), (last,)) = verifier.verify([("7", "7"), *ENDLESS]), verifier.verify([("7", "7")])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert {one.error for one in verdicts} == {f"no verdict within {MAX_PROCESSOR_S} s of processor time"}
    assert [one.is_correct for one in (good, *verdicts, last)] == [True, *[False] * len(ENDLESS), True]
    processes = 1 + len(ENDLESS)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used <= len(ENDLESS) * MAX_PROCESSOR_S + processes * START_PROCESSOR_S


def test_a_verifier_of_the_users_has_the_deadline_alone() -> None:
    with Verifier(GradingConfig(verifier=f"{spin.__module__}:spin", workers=1, deadline_s=300.0)) as verifier:
        (verdict_of_long,) = verifier.verify([(str(MAX_PROCESSOR_S + 1.0), "")])
    assert verdict_of_long.is_correct


def test_a_limit_of_the_environment_stays() -> None:
    """``ulimit -t`` is a hard limit, which no process may raise."""
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (600, 600))\n"
        "from megatron_dypo.config.grading import GradingConfig\n"
        "from megatron_dypo.grading.verify import Verifier\n"
        "with Verifier(GradingConfig(workers=1)) as verifier:\n"
        "    print(verifier.verify([('7', '7')])[0].is_correct)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["True"]
