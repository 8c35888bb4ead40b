"""The cost of a failed attempt for a group, and the time of the next attempt."""

from __future__ import annotations

import pytest

from megatron_dypo.processes.running_time import running_time
from megatron_dypo.rollout.ask import AskError, AttemptError, BusyError, LostServerError, OwnLackError, RefusedError
from megatron_dypo.rollout.attempts import Attempts, GroupDroppedError
from megatron_dypo.types import DropReason


def attempts(retries: int = 2, left_s: float = 1000.0) -> Attempts:
    return Attempts(retries=retries, deadline_s=1000.0, backoff_s=0.5, ends_at=running_time() + left_s)


def test_pauses_double_up_to_a_limit() -> None:
    some = attempts(retries=40)
    for number in range(40):
        longest = min(0.5 * 2.0**number, 30.0)
        assert longest / 2 <= some.pause_after(AttemptError("HTTP 500")) <= longest


def test_a_group_has_one_attempt_more_than_retries() -> None:
    some = attempts(retries=2)
    some.pause_after(AttemptError("first"))
    some.pause_after(AttemptError("second"))
    with pytest.raises(GroupDroppedError, match=r"3 attempts failed, the last: third") as caught:
        some.pause_after(AttemptError("third"))
    assert caught.value.reason is DropReason.INCOMPLETE


def test_one_failed_attempt_is_singular() -> None:
    with pytest.raises(GroupDroppedError, match="1 attempt failed, the last: no"):
        attempts(retries=0).pause_after(AttemptError("no"))


def test_a_pause_that_the_server_asks_for_costs_no_attempt_and_is_never_shorter() -> None:
    some = attempts(retries=0)
    assert 3.0 <= some.pause_after(BusyError("HTTP 429", 3.0)) <= 3.3
    assert some.failures == 0


def test_pauses_before_a_busy_server_is_asked_again_double_up_to_half_a_minute() -> None:
    some = attempts(retries=0)
    pauses = [some.pause_after(BusyError("HTTP 503", 0.0)) for _ in range(20)]
    expected = [min(0.5 * 2**number, 30.0) for number in range(20)]
    assert all(low <= pause <= 1.1 * low for pause, low in zip(pauses, expected, strict=True))


@pytest.mark.parametrize("kind", [LostServerError, OwnLackError])
def test_a_lost_server_and_a_lack_of_our_own_cost_no_attempt(kind: type[AskError]) -> None:
    some = attempts(retries=0)
    pauses = [some.pause_after(kind("x")) for _ in range(100)]
    assert max(pauses) <= 1.0
    assert kind is OwnLackError or max(pauses) == 0.0


def test_a_refusal_ends_a_group_at_once() -> None:
    with pytest.raises(GroupDroppedError, match="too long") as caught:
        attempts(retries=9).pause_after(RefusedError("HTTP 400: too long"))
    assert caught.value.reason is DropReason.REFUSED


def test_a_pause_never_passes_the_deadline_and_past_it_the_last_failure_is_told() -> None:
    some = attempts(retries=99, left_s=0.05)
    assert some.pause_after(AttemptError("HTTP 503: drained")) <= 0.05
    some.ends_at = running_time()
    with pytest.raises(GroupDroppedError, match=r"after request_deadline_s=1000; last failure: HTTP 503: drained"):
        some.pause_after(AttemptError("timed out"))
