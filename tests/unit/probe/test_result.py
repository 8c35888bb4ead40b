"""The whole analysis: verdicts that are known, plain numbers, and the text."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import get_args, get_type_hints

import numpy as np
import pytest

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.metrics.probe_files import FORMAT
from megatron_dypo.probe.assumptions import decide, decide_zero
from megatron_dypo.probe.gradients import LengthNormalization, Setting
from megatron_dypo.probe.resample import UNKNOWN, Estimate
from megatron_dypo.probe.result import analyse, text
from tests.support.probe_cases import Population, draw_rollouts, take, to_scores

SETTING = Setting(group_size=4, length_normalization="sum")


def example(seed=0, *, prompts=30, repeats=4, families=False, lean=3.0, shared=0.0):
    """Draw scores with the target's trace and those of four teachers, whose errors have ``shared`` in common."""
    rng = np.random.default_rng(seed)
    population = Population(lean=lean, signal=2.0, low=0.0, high=0.7)
    drawn = draw_rollouts(rng, population, prompts=prompts, repeats=repeats, group_size=4)
    right = 1 + 0.2 * rng.standard_normal((prompts, 1, 6))
    errors = shared + rng.standard_normal((prompts, 4, 6))
    if families:
        errors[:, :2] += 2 * rng.standard_normal((prompts, 1, 6))
        errors[:, 2:] += 2 * rng.standard_normal((prompts, 1, 6))
    return to_scores(drawn, traces=np.concatenate([right, right + errors], axis=1))


def verdicts(result):
    return {one["name"]: one["verdict"] for one in result["assumptions"]}


@pytest.fixture(scope="module")
def result():
    return analyse(example(), SETTING, 0.5, target="teacher-0")


def test_the_result_is_plain_json(result):
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["format"] == FORMAT
    assert result["setting"]["group_size"] == 4
    assert sum(result["tiers"][name]["value"] for name in ("mid", "hard", "easy")) == pytest.approx(1)


def test_known_assumptions_are_judged_right(result):
    found = verdicts(result)
    assert found["eta"] == "holds"  # successes lean by 3
    assert found["no_covariance"] == "does not hold"  # both are sums of the same scores
    assert found["same_direction"] == "holds"
    assert found["teachers_independent"] != "does not hold"
    assert (found["gal_variance"], found["gal_signal"]) == ("holds", "does not hold")  # a smaller gradient, no better
    assert len(found) == 12


def test_against_the_old_policy_eta_does_not_fall():
    found = analyse(example(), replace(SETTING, reference="old"), 0.5)
    assert verdicts(found)["eta"] == "does not hold"
    assert found["margins"]["frozen"]["eta"]["high"] < 0.25


def test_teachers_divide_the_error_only_of_what_they_do_not_share():
    scores = (example(prompts=200, shared=part) for part in (0, 1))
    traces = (take(one, np.flatnonzero(one.teacher_N >= 0)) for one in scores)
    right, shared = (analyse(one, SETTING, 0.5, target="teacher-0") for one in traces)
    assert verdicts(right)["teachers_slope"] == "holds"
    assert verdicts(shared)["teachers_slope"] == "does not hold"
    assert shared["teachers"]["common_share"]["low"] < 0.5 < shared["teachers"]["common_share"]["high"]


@pytest.mark.parametrize("shared", [0, 1])
def test_without_a_target_the_fall_of_the_error_tells_nothing(shared):
    found = analyse(example(shared=shared), SETTING, 0.5)
    assert found["teachers"]["slope"]["low"] > 0
    (one,) = (one for one in found["assumptions"] if one["name"] == "teachers_slope")
    assert one["verdict"] == "cannot be told"
    assert one["why"].startswith("without a target")


def test_families_of_teachers_are_found():
    found = analyse(example(families=True, prompts=60), SETTING, 0.5, target="teacher-0")
    assert verdicts(found)["teachers_independent"] == "does not hold"


def test_a_swapped_pair_of_variances_swaps_the_verdict():
    smaller, larger = Estimate(value=0.5, low=0.4, high=0.9), Estimate(value=2.0, low=1.1, high=3.0)
    assert decide(smaller, below=1.0)[0] == "holds"
    assert decide(larger, below=1.0)[0] == "does not hold"
    assert decide(larger, above=1.0)[0] == "holds"
    assert decide(smaller, above=1.0)[0] == "does not hold"
    assert decide(Estimate(value=1.0, low=0.9, high=1.1), below=1.0)[0] == "cannot be told"
    assert decide(UNKNOWN, below=1.0)[0] == "cannot be told"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.05, 0.08, "holds"),
        (0.02, 0.3, "does not hold"),
        (-0.4, -0.2, "does not hold"),
        (-0.05, 0.3, "cannot be told"),
        (None, None, "cannot be told"),
    ],
)
def test_a_zero_holds_where_the_interval_is_small(low, high, verdict):
    assert decide_zero(Estimate(value=0.0, low=low, high=high))[0] == verdict


def test_two_prompts_tell_nothing():
    found = analyse(example(prompts=2), SETTING, 0.5, target="teacher-0")
    assert set(verdicts(found).values()) == {"cannot be told"}


def test_scores_without_traces_or_rollouts_are_analysed():
    scores = example(prompts=5)
    rollouts = analyse(take(scores, np.flatnonzero(scores.teacher_N < 0)), SETTING, 0.5)
    assert rollouts["gate"]["hard_sft"]["prompts"] == 0
    traces = analyse(take(scores, np.flatnonzero(scores.teacher_N >= 0)), SETTING, 0.5)
    assert traces["teachers"]["slope"]["value"] > 0
    assert traces["tiers"]["mid"]["value"] is None
    for one in (rollouts, traces):
        json.dumps(one, allow_nan=False)
        assert text(one)


def test_the_text_has_assumptions_first_then_figures_with_intervals(result):
    lines = text(result).splitlines()
    assert lines[0].startswith("probe of step 3: 30 prompts, 480 rollouts in groups of 4, 150 traces, 6 dimensions")
    order = [
        lines.index(head)
        for head in ("Assumptions of the paper", "Figures (95% intervals)", "Dependence on the setting")
    ]
    assert order == sorted(order)
    one = result["moments"]["mid"]["total"]["grpo"]
    words = f"{one['value']:.4g} ({one['low']:.4g} to {one['high']:.4g})"
    (line,) = (line for line in lines if "moments.mid.total.grpo" in line)
    assert line.split(maxsplit=1)[1] == words
    assert "HOLDS" in text(result)


def test_the_text_has_the_cost_in_words(result):
    cost = {"rollout_seconds": 18.46, "score_seconds": 80.79, "estimate_seconds": 1.863}
    cost |= {"trajectories": 4352, "response_tokens": 78546, "dimension": 4096}
    lines = text({**result, "cost": cost}).splitlines()
    assert lines[1] == (
        "cost: 101 s: 18.5 s for rollouts, 80.8 s for scores, 1.86 s for estimates; 4,352 trajectories with 78,546 "
        "response tokens"
    )
    assert "cost:" not in text(result)


def test_each_choice_of_length_normalization_has_a_row(result):
    choices = get_args(get_type_hints(ObjectiveConfig)["length_normalization"])
    rows = [row["value"] for row in result["sensitivity"] if row["key"] == "length_normalization"]
    assert sorted(rows) == sorted(choices)


@pytest.mark.parametrize("name", get_args(LengthNormalization))
def test_a_run_finds_the_row_of_its_own_normalization(name):
    found = analyse(example(prompts=8), replace(SETTING, length_normalization=name), 0.5)
    (row,) = (row for row in found["sensitivity"] if (row["key"], row["value"]) == ("length_normalization", name))
    assert row["grpo"] == found["moments"]["all"]["total"]["grpo"]


def test_rows_of_the_sensitivity_have_each_group_size_and_agree_with_the_moments(result):
    rows = {(row["key"], row["value"]): row for row in result["sensitivity"]}
    assert [value for key, value in rows if key == "group_size"] == [2, 4, 8]
    assert [value for key, value in rows if key == "reference"] == ["old", "frozen"]
    for own in (("group_size", 4), ("length_normalization", "sum"), ("normalize_std", True), ("reference", "frozen")):
        assert rows[own]["grpo"] == result["moments"]["all"]["total"]["grpo"]
        assert rows[own]["correlation"] == result["moments"]["all"]["ratios"]["correlation"]
    other = analyse(example(), replace(SETTING, group_size=8, length_normalization="sum"), 0.5, target="teacher-0")
    assert rows["group_size", 8]["gal"] == other["moments"]["all"]["total"]["gal"]


def test_an_alpha_outside_of_its_range_is_refused():
    with pytest.raises(ValueError, match=r"alpha=1.5: must be in \[0, 1\]"):
        analyse(example(prompts=3), SETTING, 1.5)
