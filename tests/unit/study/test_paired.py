"""Paired tests and Holm's correction against published examples and naive enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from megatron_dypo.study.paired import holm, mcnemar_p, permutation_p, wilcoxon_p


def test_the_permutation_test_of_few_items_is_the_enumeration_of_all_signs():
    differences = np.array([0.5, -0.25, 1.0, 0.75, 0.0, 0.5, -0.1, 0.3])
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in itertools.product((1, -1), repeat=8)
    ]
    upper = sum(total >= differences.sum() - 1e-12 for total in sums) / len(sums)
    assert permutation_p(differences) == pytest.approx(2 * upper, abs=1e-9)


def test_wilcoxons_test_gives_the_p_value_of_the_maize_plants_of_scipys_manual():
    differences = np.array([6, 8, 14, 16, 23, 24, 28, 29, 41, -48, 49, 56, 60, -67, 75], float)
    assert wilcoxon_p(differences) == pytest.approx(0.041259765625, abs=1e-9)
    assert wilcoxon_p(np.zeros(4)) == 1.0


def test_mcnemars_test_is_the_binomial_sum_over_items_that_one_method_alone_solves():
    # 6 and 16 discordant pairs: two-sided p 0.0525.
    first = np.array([1] * 30 + [1] * 6 + [0] * 16 + [0] * 9, float)
    second = np.array([1] * 30 + [0] * 6 + [1] * 16 + [0] * 9, float)
    expected = 2 * sum(math.comb(22, k) for k in range(7)) / 2**22
    assert mcnemar_p(first, second) == pytest.approx(expected, abs=1e-9)
    assert expected == pytest.approx(0.0525, abs=5e-5)
    assert mcnemar_p(first, first) == 1.0


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.01, 0.02, 0.03, 0.04, 0.05], [0.05, 0.08, 0.09, 0.09, 0.09]),  # R's p.adjust
        ([0.9, 0.8], [1.0, 1.0]),
        ([], []),
    ],
)
def test_holms_correction_gives_published_values(p_values, adjusted):
    assert holm(p_values) == pytest.approx(adjusted, abs=1e-9)


def test_holms_correction_keeps_false_findings_below_the_level():
    rng = np.random.default_rng(0)
    findings = [min(holm(rng.random(8).tolist())) < 0.05 for _ in range(2000)]
    assert np.mean(findings) < 0.065
