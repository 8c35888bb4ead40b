"""The counts with which a collection ends a run, and the cause."""

from __future__ import annotations

from collections import Counter

import pytest

from megatron_dypo.ending import Cause
from megatron_dypo.loop.books.outcomes import Outcomes, count_verdicts, end_without_samples, end_without_verdicts
from megatron_dypo.types import DropReason, GradedGroup, Rollout, Verdict
from tests.support.loop_cases import Prompts

ROWS = 12


def outcomes(*, graded: int = 0, verdicts: int = 0, reason: str = "", **dropped: int) -> Outcomes:
    found = Outcomes(graded=graded, verdicts=verdicts, last_reason=reason)
    for name, count in dropped.items():
        found.drop(DropReason(name), count)
    return found


def end(found: Outcomes) -> tuple[Cause, str] | None:
    error = end_without_samples(found, num_prompts=ROWS, step=3, max_prompt_tokens=64)
    return (error.cause, str(error)) if error else None


def test_a_prompt_is_seen_once_whatever_became_of_it() -> None:
    found = outcomes(graded=5, easy=2, no_teacher=3, stale=1, incomplete=1, refused=2, no_verdict=4, too_long=8)
    assert found.seen == 5 + 1 + 2 + 4 + 8, "Easy, Hard and stale prompts are among the graded"
    assert found.lost == 3


def test_outcomes_of_replicas_add_up_and_keep_a_reason() -> None:
    one, other = outcomes(graded=1, verdicts=3, easy=1), outcomes(graded=2, verdicts=5, easy=4, refused=1, reason="why")
    total = one + other
    assert (total.graded, total.verdicts, total.last_reason) == (3, 8, "why")
    assert +total.dropped == Counter({DropReason.EASY: 5, DropReason.REFUSED: 1})


def test_the_last_reason_is_that_of_the_last_group_that_has_one() -> None:
    found = outcomes()
    found.drop(DropReason.INCOMPLETE, message="first")
    found.drop(DropReason.INCOMPLETE, message="second")
    found.drop(DropReason.EASY)
    assert found.last_reason == "second"


def test_verdicts_are_of_rollouts_that_the_verifier_was_asked_about_and_answered() -> None:
    def rollout(finish: str) -> Rollout:
        return Rollout(tokens=[1], logp=[0.0], text="", finish=finish, policy_version=0)  # type: ignore[arg-type]

    verdict, failure = Verdict(is_correct=False, reward=0.0), Verdict(is_correct=False, reward=0.0, error="raised")
    rollouts = (rollout("stop"), rollout("length"), rollout("stop"))
    group = GradedGroup(prompt=Prompts().prompt(0), rollouts=rollouts, verdicts=(verdict, verdict, failure), tier=None)
    assert count_verdicts([group, group], fail_truncated=True) == 2
    assert count_verdicts([group, group], fail_truncated=False) == 4


@pytest.mark.parametrize(
    ("failed_before", "failed", "verdicts_before", "verdicts", "ends"),
    [
        (0, 4, 0, 0, True),
        (0, 3, 0, 0, False),
        (2, 5, 0, 0, False),
        (2, 6, 0, 0, True),
        (0, 9, 0, 1, False),
        (0, 9, 7, 7, True),
        (0, 9, 7, 8, False),
    ],
)
def test_a_verifier_that_judged_nothing_since_a_look_ends_the_run(
    failed_before: int, failed: int, verdicts_before: int, verdicts: int, ends: bool
) -> None:
    before = outcomes(verdicts=verdicts_before, no_verdict=failed_before)
    now = outcomes(verdicts=verdicts, reason="KeyError", no_verdict=failed)
    error = end_without_verdicts(now, before, at_least=4)
    assert (error is not None) is ends
    if error is not None:
        assert error.cause is Cause.NO_VERDICTS
        assert f"any rollout of {failed - failed_before} groups in a row; the last reason: KeyError" in str(error)


@pytest.mark.parametrize(
    ("found", "cause"),
    [
        (outcomes(too_long=12), Cause.BAD_INPUT),
        (outcomes(too_long=11, incomplete=1), Cause.GROUPS_LOST),
        (outcomes(too_long=11, no_verdict=1), Cause.NO_VERDICTS),
        (outcomes(incomplete=2, refused=1, no_verdict=3), Cause.GROUPS_LOST),
        (outcomes(incomplete=2, refused=1, no_verdict=4), Cause.NO_VERDICTS),
        (outcomes(graded=12, easy=7, no_teacher=5), Cause.NOTHING_LEFT),
        (outcomes(graded=6, easy=6, incomplete=3, refused=3), Cause.NOTHING_LEFT),
        (outcomes(graded=5, easy=5, incomplete=4, no_verdict=3), Cause.GROUPS_LOST),
        (outcomes(graded=2, easy=2, incomplete=5, no_verdict=5), Cause.GROUPS_LOST),
        (outcomes(graded=2, easy=2, incomplete=4, no_verdict=6), Cause.NO_VERDICTS),
    ],
)
def test_the_cause_of_an_end_is_what_most_prompts_came_to(found: Outcomes, cause: Cause) -> None:
    ended = end(found)
    assert ended is not None
    assert ended[0] is cause


def test_nothing_is_said_to_be_left_only_after_every_prompt_was_seen() -> None:
    assert end(outcomes(graded=11, easy=11)) is None
    assert end(outcomes(graded=1, easy=1, incomplete=10)) is None
    assert end(outcomes(graded=1, easy=1, too_long=11)) is not None
    assert end(outcomes(incomplete=4)) is not None, "nothing was graded at all: more of the same would not help"


def test_an_end_says_how_many_draws_came_to_what() -> None:
    assert end(outcomes(too_long=12)) == (
        Cause.BAD_INPUT,
        "step 3: 12 of 12 prompts are longer than data.max_prompt_tokens=64",
    )
    ended = end(outcomes(too_long=1, incomplete=3, reason="HTTP 500"))
    words = "1 too long, 3 with an incomplete group; the last reason: HTTP 500"
    assert ended == (Cause.GROUPS_LOST, f"step 3: none of 4 prompts could be graded: {words}")
    ended = end(outcomes(graded=1, easy=1, incomplete=11, reason="HTTP 500"))
    words = "1 Easy, 11 with an incomplete group; the last reason: HTTP 500"
    assert ended == (Cause.GROUPS_LOST, f"step 3: no trainable prompt among 12 draws: {words}")
