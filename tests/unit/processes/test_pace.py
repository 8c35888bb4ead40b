"""The usual time of a step and of its parts, and when a longer one is a stall."""

import pytest

from megatron_dypo.processes.pace import SILENCE_S, SLACK_S, Pace

LATEST_S = 900.0


def walked(*steps: dict[str, float]) -> tuple[Pace, float]:
    """Return a pace after ``steps``, each a time by part, and the time at the end."""
    pace, now = Pace(), 1000.0
    pace.enter("starting", now)
    for parts in steps:
        pace.begin_step(now)
        for part, seconds in parts.items():
            pace.enter(part, now)
            now += seconds
    pace.begin_step(now)
    return pace, now


def test_usual_times_are_medians_over_steps_from_the_third_on() -> None:
    two, _ = walked({"collecting": 100.0, "updating": 2.0}, {"collecting": 5.0, "updating": 1.0})
    assert two.usual_step_s() is None
    assert two.silence_limit_s(LATEST_S) == SILENCE_S, "heartbeats do not depend on steps"
    assert two.silence_limit_s(30.0) == 30.0
    three, now = walked(*[{"collecting": seconds, "updating": 1.0} for seconds in (100.0, 5.0, 6.0)])
    assert three.usual_step_s() == 7.0
    assert three.silence_limit_s(LATEST_S) == 3 * 7.0 + SLACK_S
    three.enter("updating", now)
    assert three.usual_part_s() == 1.0
    assert three.part_limit_s(LATEST_S) == 3 * 1.0 + SLACK_S


def test_a_part_that_a_step_returns_to_counts_as_one() -> None:
    pace, now = walked(*[{"updating": 1.0} for _ in range(3)])
    for _ in range(10):
        pace.enter("asking", now)
        now += 2.0
        pace.enter("waiting", now)
        now += 1.0
    pace.enter("asking", now)
    assert pace.seconds_in_part(now + 0.5) == pytest.approx(20.5)
    assert pace.part_limit_s(LATEST_S) == LATEST_S, "a part without a usual time"


def test_a_part_whose_time_varies_may_take_half_as_long_again_as_its_second_longest() -> None:
    pace, now = walked(*[{"collecting": seconds} for seconds in (1.0, 1.0, 1.0, 800.0, 200.0)])
    pace.enter("collecting", now)
    assert pace.part_limit_s(LATEST_S) == 1.5 * 200.0 + SLACK_S
    assert pace.part_limit_s(100.0) == 100.0


def test_a_rare_part_does_not_count_as_long_as_the_others() -> None:
    steps = [{"updating": 1.0, **({"evaluating": 500.0} if index % 2 else {})} for index in range(6)]
    pace, now = walked(*steps)
    pace.enter("evaluating", now)
    assert pace.part_limit_s(1e6) == 1500.0 + SLACK_S
    pace.enter("updating", now)
    assert pace.part_limit_s(1e6) == 3.0 + SLACK_S


def test_time_in_which_the_process_was_stopped_is_left_out() -> None:
    pace, now = walked(*[{"updating": 1.0} for _ in range(3)])
    pace.enter("updating", now)
    pace.excuse(3600.0)
    assert pace.seconds_in_part(now + 3602.0) == pytest.approx(2.0)
