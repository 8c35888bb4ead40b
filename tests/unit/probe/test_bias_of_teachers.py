"""Bias of teachers: known b² and σ², the curve over m, and level and power of the test of independent errors."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from scipy import stats

from megatron_dypo.probe.gradients import Setting
from megatron_dypo.probe.teachers import estimate_teachers, hotelling, off_diagonal, teacher_errors
from tests.support.probe_cases import Population, draw_rollouts, take, to_scores

SETTING = Setting(group_size=4, length_normalization="sum")
DIMENSIONS = 16


def draw(seed, *, prompts=60, teachers=4, shared_sd=0.0, families=(), own_sd=1.0, bias=0.5):
    """Draw scores with the target's trace first: errors have a common part ``bias``, one of their family, their own.

    b² = 16·bias² and σ² = 16·own_sd², without families.
    """
    rng = np.random.default_rng(seed)
    drawn = draw_rollouts(rng, Population(dimensions=DIMENSIONS), prompts=prompts, repeats=1, group_size=4)
    right = rng.standard_normal((prompts, 1, DIMENSIONS))
    errors = bias + own_sd * rng.standard_normal((prompts, teachers, DIMENSIONS))
    for members in families:
        errors[:, members] += shared_sd * rng.standard_normal((prompts, 1, DIMENSIONS))
    return to_scores(drawn, traces=np.concatenate([right, right + errors], axis=1))


def estimates(scores, *, target: str | None = "teacher-0") -> Any:
    return estimate_teachers(teacher_errors(scores, SETTING, target))


def test_offset_and_slope_are_unbiased_and_their_intervals_cover():
    found = [estimates(draw(seed)) for seed in range(60)]
    for name, truth in (("offset", 16 * 0.25), ("slope", 16.0)):
        values = np.array([one[name].value for one in found])
        assert abs(values.mean() - truth) < 3.5 * values.std(ddof=1) / np.sqrt(len(values))
        assert np.mean([one[name].low <= truth <= one[name].high for one in found]) >= 0.9


def test_the_curve_is_the_mean_over_all_subsets_and_the_nested_subsets():
    scores = draw(1, prompts=7)
    gradient = -scores.score_Nd[scores.teacher_N >= 0].astype(float).reshape(7, 5, DIMENSIONS)
    error = gradient[:, 1:] - gradient[:, :1]
    found = estimates(scores)
    for m in range(1, 5):
        size = [
            np.mean((error[:, list(subset)].mean(1) ** 2).sum(-1)) for subset in itertools.combinations(range(4), m)
        ]
        point = found["curve"][m - 1]
        assert point["all_subsets"].value == pytest.approx(np.mean(size))
        assert point["nested"].value == pytest.approx(size[0])
        assert point["nested_minus_fit"].value == pytest.approx(size[0] - np.mean(size))
        fit = found["offset"].value + found["slope"].value / m
        assert point["all_subsets"].value == pytest.approx(fit)


def test_without_a_target_the_slope_is_half_the_squared_distance_of_two_teachers():
    scores = draw(2)
    found = estimates(scores, target=None)
    gradient = -scores.score_Nd[scores.teacher_N >= 0].astype(float).reshape(60, 5, DIMENSIONS)
    distances = [
        ((gradient[:, a] - gradient[:, b]) ** 2).sum(-1).mean() / 2 for a, b in itertools.combinations(range(5), 2)
    ]
    assert found["slope"].value == pytest.approx(np.mean(distances))
    assert found["offset"].value == 0
    assert "0 by construction" in found["target"]
    for point in found["curve"]:
        assert point["all_subsets"].value == pytest.approx(found["slope"].value / point["teachers"])


def test_independent_errors_are_rejected_as_often_as_the_level_says():
    p = [
        estimates(draw(seed, prompts=80, teachers=3))[test]["p"]
        for seed in range(150)
        for test in ("equal_products", "equal_sizes")
    ]
    assert 0.02 <= np.mean(np.array(p) < 0.05) <= 0.09


def test_families_with_shared_errors_are_rejected():
    p = [estimates(draw(seed, families=([0, 1], [2, 3]), shared_sd=0.6))["equal_products"]["p"] for seed in range(30)]
    assert np.mean(np.array(p) < 0.05) >= 0.95
    without = [
        estimates(draw(seed, families=([1, 2],), shared_sd=0.8), target=None)["equal_products"]["p"]
        for seed in range(30)
    ]
    assert np.mean(np.array(without) < 0.05) >= 0.9


def test_with_families_the_nested_subsets_lie_off_the_fit():
    found = estimates(draw(3, prompts=200, families=([0, 1], [2, 3]), shared_sd=0.8))
    point = found["curve"][1]["nested_minus_fit"]  # two teachers of one family are worse than two of two families
    assert point.low > 0
    assert found["largest_correlation"].high > 0.2


def test_teachers_with_larger_errors_are_rejected():
    rng = np.random.default_rng(4)
    scores = draw(4)
    traces = rng.standard_normal((60, 4, DIMENSIONS)) * np.array([0, 1, 1, 1.3])[:, None]
    drawn = draw_rollouts(rng, Population(dimensions=DIMENSIONS), prompts=60, repeats=1, group_size=4)
    assert estimates(to_scores(drawn, traces=traces))["equal_sizes"]["p"] < 0.001
    assert estimates(scores)["equal_sizes"]["p"] > 0.01


def test_hotelling_of_two_values_is_the_paired_t_test():
    values = np.random.default_rng(5).standard_normal((20, 2)) + np.array([0, 0.4])
    found: Any = hotelling(values)
    assert found["p"] == pytest.approx(stats.ttest_rel(values[:, 0], values[:, 1]).pvalue)


def test_hotelling_does_not_depend_on_the_choice_of_contrasts():
    values = np.random.default_rng(6).standard_normal((30, 5)) * [1, 2, 3, 1, 1]
    first: Any = hotelling(values)
    second: Any = hotelling(values[:, ::-1])
    assert first["p"] == pytest.approx(second["p"])


def test_hotelling_does_not_count_a_quantity_that_equals_another():
    values = np.random.default_rng(6).standard_normal((30, 4)) * [1, 2, 3, 1]
    first: Any = hotelling(values)
    second: Any = hotelling(values[:, [0, 2, 1, 1, 3, 0]])
    assert (first["contrasts"], first["p"]) == (second["contrasts"], pytest.approx(second["p"]))


def test_quantities_that_are_equal_on_every_prompt_are_not_tested():
    found: Any = hotelling(np.random.default_rng(6).standard_normal((30, 1)) * np.ones(3))
    assert (found["p"], found["contrasts"]) == (None, 0)


@pytest.mark.parametrize(("prompts", "is_tested"), [(7, True), (6, False)])
def test_too_few_prompts_are_said_and_not_tested(prompts, is_tested):
    found: Any = hotelling(np.random.default_rng(7).standard_normal((prompts, 6)))
    assert (found["p"] is not None) == is_tested
    assert is_tested or found["why"] == "6 prompts are too few for 5 contrasts: at least 7 are needed"


def test_prompts_without_a_trace_of_each_teacher_are_left_out():
    scores = draw(8, prompts=10)
    gone = (scores.prompt_N == 3) & (scores.teacher_N == 2)
    errors = teacher_errors(take(scores, np.flatnonzero(~gone)), SETTING, "teacher-0")
    whole = teacher_errors(scores, SETTING, "teacher-0")
    np.testing.assert_allclose(errors.product_PMM, np.delete(whole.product_PMM, 3, axis=0))
    assert off_diagonal(errors.product_PMM).shape == (9, 6)


def test_one_teacher_tells_nothing():
    assert estimates(draw(9, teachers=1)) is None
    assert (
        estimates(
            to_scores(draw_rollouts(np.random.default_rng(0), Population(), prompts=3, repeats=1, group_size=4)),
            target=None,
        )
        is None
    )


def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match="target=x: must be a teacher of the scores: teacher-0, "):
        teacher_errors(draw(0, prompts=3), SETTING, "x")
