"""avg@n, pass@k and maj@k equal a count over all choices of responses."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from megatron_dypo.eval.estimators import (
    Votes,
    avg_at_n,
    avg_interval,
    maj_at_k,
    mean_maj_at_k,
    mean_pass_at_k,
    pass_at_k,
    shown_ks,
)
from megatron_dypo.metrics.intervals import accuracy_interval


def chosen(responses: list[str], k: int) -> list[tuple[str, ...]]:
    return [tuple(responses[i] for i in places) for places in itertools.combinations(range(len(responses)), k)]


def literal_majority(choice: tuple[str, ...]) -> Fraction:
    """Return the chance that the majority of a choice is "right"; "" abstains."""
    counts = Counter(answer for answer in choice if answer)
    most = [answer for answer, count in counts.items() if count == max(counts.values())]
    return Fraction("right" in most, len(most)) if most else Fraction(0)


def votes_of(responses: list[str]) -> Votes:
    wrong = Counter(answer for answer in responses if answer not in ("right", ""))
    return Votes(correct=responses.count("right"), wrong=wrong, abstained=responses.count(""))


def test_pass_at_k_is_the_share_of_all_choices_with_a_correct_response() -> None:
    for n in range(1, 9):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            choices = chosen(["right"] * c + ["wrong"] * (n - c), k)
            assert pass_at_k(n, c, k) == pytest.approx(sum("right" in one for one in choices) / len(choices), abs=1e-12)


def test_pass_at_k_equals_the_numerically_stable_product_of_its_paper() -> None:
    for n, c, k in [(200, 3, 1), (200, 3, 10), (200, 3, 100), (200, 150, 60), (64, 1, 64), (1024, 511, 512)]:
        # Chen et al. 2021, figure 3.
        expected = 1.0 if n - c < k else 1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))
        assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_one_is_the_accuracy() -> None:
    assert mean_pass_at_k([3, 0, 8], [8, 8, 8], 1) == pytest.approx(avg_at_n([3, 0, 8], [8, 8, 8]), abs=1e-15)


def test_an_item_with_fewer_responses_than_k_is_left_out_of_the_mean() -> None:
    assert mean_pass_at_k([1, 1], [4, 2], 4) == 1.0
    assert mean_pass_at_k([0, 1], [4, 2], 2) == pytest.approx(0.5)
    assert mean_pass_at_k([1, 1], [4, 2], 5) is None
    assert mean_maj_at_k([Votes(correct=1), Votes(correct=1, abstained=1)], 3) is None


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_counts_that_cannot_be_are_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"n={n}, c={c}, k={k}"):
        pass_at_k(n, c, k)


def test_a_majority_is_the_mean_over_all_choices_with_ties_shared() -> None:
    generator = np.random.default_rng(7)
    for _ in range(60):
        n = int(generator.integers(1, 9))
        responses = [["right", "a", "b", "c", ""][i] for i in generator.integers(0, 5, size=n)]
        for k in range(1, n + 1):
            choices = chosen(responses, k)
            expected = float(sum(map(literal_majority, choices)) / len(choices))
            assert maj_at_k(votes_of(responses), k) == pytest.approx(expected, abs=1e-12), (responses, k)


def test_a_majority_of_all_responses_shares_ties() -> None:
    assert maj_at_k(Votes(correct=2, wrong={"7": 2, "8": 1}), 5) == 0.5
    assert maj_at_k(Votes(correct=2, wrong={"7": 2, "8": 2}), 6) == pytest.approx(1 / 3)
    assert maj_at_k(Votes(correct=1, abstained=63), 64) == 1.0
    assert maj_at_k(Votes(correct=0, abstained=3), 3) == 0.0


def test_majorities_of_many_responses_stay_exact() -> None:
    # With two answers the majority of k is right if more than half are; exactly half counts 1/2 (hypergeometric).
    from scipy.stats import hypergeom

    n, c, k = 256, 120, 64
    law = hypergeom(n, c, k)
    expected = law.sf(k // 2) + law.pmf(k // 2) / 2
    assert maj_at_k(Votes(correct=c, wrong={"x": n - c}), k) == pytest.approx(expected, abs=1e-12)


def test_the_interval_takes_items_as_clusters_and_skips_those_without_a_verdict() -> None:
    assert avg_interval([8, 0, 4, 0], [8, 0, 8, 8]) == accuracy_interval([8, 4, 0], [8, 8, 8])
    assert avg_interval([0, 0], [0, 0]) is None
    assert avg_at_n([0], [0]) is None


def test_figures_are_shown_for_powers_of_two_and_for_all_responses() -> None:
    assert [shown_ks(n) for n in (0, 1, 2, 6, 8)] == [[], [1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]
