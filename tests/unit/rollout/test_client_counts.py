"""Counts of a client: sums, maxima, and differences since an earlier look."""

from __future__ import annotations

from megatron_dypo.rollout.counts import AttemptCounts, ClientCounts

ONE = ClientCounts(retries=1, wrong_versions=2, dropped_rollouts=3, dropped_tokens=40, dropped_longest=20)
OTHER = ClientCounts(retries=10, wrong_versions=30, dropped_rollouts=50, dropped_tokens=700, dropped_longest=17)


def test_counts_of_two_clients_add_up_and_the_longest_is_that_of_both() -> None:
    expected = ClientCounts(retries=11, wrong_versions=32, dropped_rollouts=53, dropped_tokens=740, dropped_longest=20)
    assert ONE + OTHER == OTHER + ONE == expected


def test_counts_since_a_look_are_what_came_after_it() -> None:
    later = (ONE + OTHER).since(OTHER)
    assert (later.retries, later.wrong_versions, later.dropped_rollouts, later.dropped_tokens) == (1, 2, 3, 40)
    assert later.dropped_longest == 20, "the longest stays that of all"


def test_what_was_sampled_and_thrown_away_is_counted_by_responses_and_tokens() -> None:
    counts = AttemptCounts()
    assert counts.counts() == ClientCounts()
    counts.count_dropped([{"output_ids": [1, 2, 3]}, {"output_ids": [4]}, {"output_ids": []}, {}, "no response"])
    counts.count_dropped({"output_ids": [5, 6]})
    found = counts.counts()
    assert (found.dropped_rollouts, found.dropped_tokens, found.dropped_longest) == (3, 6, 3)
    assert (found.retries, found.wrong_versions) == (0, 0)
