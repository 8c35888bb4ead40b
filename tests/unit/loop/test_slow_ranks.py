"""Ranks that are regularly slow are named once, with what the others lose; ranks that are slow by chance are not."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from megatron_dypo.loop.books.slow_ranks import NEEDED, WINDOW, SlowRanks
from megatron_dypo.metrics.names import lookup


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("slow: ")]


@pytest.fixture
def caplog_of_package(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("megatron_dypo"), "propagate", True)
    caplog.set_level(logging.WARNING, "megatron_dypo")
    return caplog


def test_the_metrics_of_a_step_are_the_slowest_rank_and_the_wait_for_it() -> None:
    metrics = SlowRanks().look([1.0, 1.0, 1.5, 0.5], [1e9] * 4)
    assert metrics == {
        "perf/slowest_rank": 2.0,
        "perf/slowest_rank_excess": 0.5,
        "perf/rank_wait_ratio": pytest.approx((0.5 + 0.5 + 0.0 + 1.0) / 4 / 1.5),
    }
    for name in metrics:
        lookup(name)


def test_of_two_ranks_the_slower_is_named() -> None:
    slow = SlowRanks()
    for _ in range(NEEDED):
        assert slow.look([1.0, 1.3], [1e9, 1e9])["perf/slowest_rank_excess"] == pytest.approx(0.3)
    assert slow.news() == ([1], [])


def test_one_rank_waits_for_none() -> None:
    assert SlowRanks().look([1.0], [1e9]) == {}


def test_a_rank_that_is_regularly_slow_is_named_once_until_it_keeps_up(
    caplog_of_package: pytest.LogCaptureFixture,
) -> None:
    slow = SlowRanks()
    for step in range(1, 31):
        times = [1.0, 1.0, 1.4, 1.0] if step <= 20 else [1.0] * 4
        slow.warn(step, slow.look(times, [1e9] * 4), "rank {} on node1".format)
        assert len(lines_of(caplog_of_package)) == (step >= NEEDED) + (step >= 20 + WINDOW - 2)
    named, over = lines_of(caplog_of_package)
    assert named.startswith(f"slow: step {NEEDED}: rank 2 on node1 took over 1.2 times as long as the median rank")
    assert named.endswith("the mean rank waits for 21% of forward and backward")
    assert over == "slow: step 28: rank 2 on node1 keeps up again"


def test_ranks_that_are_slow_by_chance_or_have_more_work_are_not_named(
    caplog_of_package: pytest.LogCaptureFixture,
) -> None:
    random, slow = np.random.default_rng(7), SlowRanks()
    for step in range(1, 200):
        work = np.array([1e9, 1e9, 3e9, 1e9])
        paces = random.uniform(0.9, 1.0, 4)
        paces[random.integers(4)] *= 1.5  # another rank is slow in each step
        slow.warn(step, slow.look((work / 1e9 * paces).tolist(), work.tolist()), str)
    assert lines_of(caplog_of_package) == []
