"""The tables say which method is better, what is noise, what is too small to tell, and what is missing."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
import pytest

from megatron_dypo.eval.estimators import pass_at_k
from megatron_dypo.eval.records import Record
from megatron_dypo.metrics.report.page import render_template
from megatron_dypo.study.cells import Arm
from megatron_dypo.study.formats import to_latex, to_markdown
from megatron_dypo.study.grids import differences_grid, main_grid
from megatron_dypo.study.plots import plot_columns
from megatron_dypo.study.results import Verdict, make_result
from megatron_dypo.study.scores import CellScores, score_cell, score_table
from megatron_dypo.study.spec import Spec, TableSpec
from tests.support.present import present

GROUPS = {"avg": ("math", "logic")}


class Headers(HTMLParser):
    """The texts of a page's table headers."""

    def __init__(self):
        super().__init__()
        self.found, self.inside = [], False

    def handle_starttag(self, tag, attrs):
        self.inside = tag == "th"

    def handle_data(self, data):
        if self.inside and data.strip():
            self.found.append(data)


def spec(*methods, **changes):
    return Spec(
        config="config.yaml",
        out="out",
        **{
            "methods": {name: {} for name in methods},
            "seeds": (1, 2, 3),
            "baseline": methods[0],
            "resamples": 399,
            **changes,
        },
    )


def cell(correct, prefix="item", lacking=()):
    """Return the scores of one cell: 0 or 1 for each item."""
    items = {f"{prefix}{index:04}": float(value) for index, value in enumerate(correct)}
    known = {item: value for item, value in items.items() if item not in lacking}
    return CellScores(by_item=known, items=frozenset(items), samples=1)


def scores_of(means, *, items=600, seeds=(1, 2, 3), sets=("math", "logic"), seed=0):
    """Draw scores of methods with these true accuracies; all methods find the same items easy."""
    rng, found = np.random.default_rng(seed), {}
    for name in sets:
        luck = rng.random(items)
        for method, mean in means.items():
            cells = {s: cell(np.where(rng.random(items) < 0.05, 1 - (luck < mean), luck < mean)) for s in seeds}
            found[Arm(method=method), name] = score_table(cells)
    return found


def verdict(result, method, column):
    return result.differences[Arm(method=method), column].verdict


def test_a_large_difference_is_found_and_the_best_is_bold_an_equal_one_is_noise():
    result = make_result(
        "main", spec("base", "good", "same"), GROUPS, scores_of({"base": 0.4, "good": 0.6, "same": 0.4})
    )
    for column in ("math", "logic", "avg"):
        assert verdict(result, "good", column) is Verdict.BETTER
        assert verdict(result, "same", column) in (Verdict.NOISE, Verdict.TOO_SMALL)
        assert result.best[column] == Arm(method="good")
    worse = make_result("main", spec("good", "base"), GROUPS, scores_of({"base": 0.4, "good": 0.6}))
    assert verdict(worse, "base", "avg") is Verdict.WORSE
    assert worse.best["avg"] == Arm(method="good")


def test_what_could_have_been_found_tells_noise_from_too_small_a_sample():
    methods, scores = ("base", "same"), scores_of({"base": 0.5, "same": 0.5}, items=2000)
    could_find = make_result("main", spec(*methods), GROUPS, scores).differences[Arm(method="same"), "avg"]
    limit = present(could_find.spread.detectable)
    for smallest, expected in ((1.01 * limit, Verdict.NOISE), (0.99 * limit, Verdict.TOO_SMALL)):
        result = make_result("main", spec(*methods, smallest_difference=smallest), GROUPS, scores)
        assert verdict(result, "same", "avg") is expected


def test_a_difference_that_is_found_needs_more_than_its_own_p_among_many():
    scores = scores_of({"base": 0.5, **{f"m{i}": 0.5 for i in range(6)}}, items=100)
    result = make_result("main", spec("base", *(f"m{i}" for i in range(6))), GROUPS, scores)
    assert len(result.differences) == 18
    for one in result.differences.values():
        assert present(one.p_holm) >= present(one.spread.p)
    assert result.best == {}


def test_methods_are_compared_on_the_seeds_and_items_that_both_have():
    scores = scores_of({"base": 0.5, "other": 0.5}, items=50, sets=("math",))
    cells = {1: cell([1] * 50), 3: cell([1] * 50, lacking=("item0000", "item0007"))}
    scores[Arm(method="other"), "math"] = score_table(cells)
    result = make_result("main", spec("base", "other"), {"avg": ("math",)}, scores)
    difference = result.differences[Arm(method="other"), "math"]
    assert (difference.seeds, difference.items) == (2, 48)
    base = scores[Arm(method="base"), "math"]
    matched = base.rows([1, 3], [item for item in base.items if item not in ("item0000", "item0007")])
    assert difference.spread.mean == pytest.approx(1 - matched.mean(), abs=1e-12)
    text = to_markdown(main_grid(result, [], scores))
    assert "other: 2 of 3 seeds only." in text
    assert "other on math: 2 of 50 items left out: some seed has no verdict on them." in text


def test_mcnemars_test_is_made_of_one_run_with_one_response_alone():
    one = make_result("main", spec("a", "b"), GROUPS, scores_of({"a": 0.4, "b": 0.6}, seeds=(1,)))
    assert present(one.differences[Arm(method="b"), "math"].p_mcnemar) < 0.001
    assert one.differences[Arm(method="b"), "avg"].p_mcnemar is None
    three = make_result("main", spec("a", "b"), GROUPS, scores_of({"a": 0.4, "b": 0.6}))
    assert three.differences[Arm(method="b"), "math"].p_mcnemar is None
    assert "One seed says nothing about other seeds" in to_markdown(main_grid(one, [], {}))


def test_each_row_of_an_ablation_is_compared_with_the_one_above():
    tables = {"ablation": TableSpec(methods=("base", "plus", "both"), sets=("logic",), against="previous")}
    scores = scores_of({"base": 0.3, "plus": 0.5, "both": 0.5})
    result = make_result("ablation", spec("both", "plus", "base", tables=tables), GROUPS, scores)
    assert [arm.method for arm in result.arms] == ["base", "plus", "both"]
    assert [column.name for column in result.columns] == ["logic"]
    assert {arm.method: reference.method for arm, reference in result.references.items()} == {
        "plus": "base",
        "both": "plus",
    }
    assert verdict(result, "plus", "logic") is Verdict.BETTER
    assert "Against the row above" in to_markdown(main_grid(result, [], scores))


def test_variants_of_the_data_are_rows_of_their_own_each_against_the_baseline_on_the_same_data():
    two = spec("base", "other", data={"small": {}, "large": {}})
    result = make_result("main", two, GROUPS, {})
    assert [arm.label for arm in result.arms] == ["base (small)", "base (large)", "other (small)", "other (large)"]
    assert {arm.label: reference.label for arm, reference in result.references.items()} == {
        "other (small)": "base (small)",
        "other (large)": "base (large)",
    }


def test_a_method_without_a_result_has_an_empty_row_and_no_average_of_a_part():
    scores = scores_of({"base": 0.5, "half": 0.5})
    del scores[Arm(method="half"), "logic"]
    result = make_result("main", spec("base", "half", "none"), GROUPS, scores)
    rows = {row[0].text: [entry.text for entry in row[1:]] for row in main_grid(result, [], scores).rows}
    assert rows["none"] == ["–", "–", "–"]
    assert rows["half"][1:] == ["–", "–"]
    assert rows["half"][0] != "–"


def test_the_score_of_an_item_is_pass_at_k_over_its_responses_with_a_verdict():
    def response(item, sample, correct):
        return Record(
            set="s",
            item=item,
            sample=sample,
            seed=0,
            source="",
            correct=correct,
            truncated=False,
            num_tokens=1,
            response="",
            answer=None,
        )

    records = [response("a", index, index < 2) for index in range(5)] + [response("a", 5, None), response("b", 0, True)]
    assert score_cell(records, 1).by_item == {"a": 2 / 5, "b": 1.0}
    assert score_cell(records, 3).by_item == {"a": pass_at_k(5, 2, 3)}
    assert score_cell(records, 3).items == {"a", "b"}


def test_markdown_shows_mean_deviation_interval_and_mark_in_one_field():
    scores = scores_of({"base": 0.4, "good": 0.6})
    result = make_result("main", spec("base", "good"), GROUPS, scores)
    lines = to_markdown(main_grid(result, [], scores)).splitlines()
    assert lines[2] == "|  | math | logic | avg |"
    found = result.estimates[Arm(method="good"), "math"].spread
    mean, sd, low, high = (f"{100 * present(value):.1f}" for value in (found.mean, found.sd, found.low, found.high))
    expected = f"**{mean}** ± {sd} [{low}, {high}] ▲"
    assert lines[5].split(" | ")[1] == expected
    assert {line.count("|") for line in lines if line.startswith("|")} == {5}


def test_latex_has_a_row_for_each_arm_with_as_many_fields_as_columns_and_no_bare_special_letter():
    scores = scores_of({"base_1": 0.4, "good": 0.6})
    result = make_result("main", spec("base_1", "good"), GROUPS, scores)
    text = to_latex(main_grid(result, [], scores))
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert [row.count("&") for row in rows] == [3, 3, 3]
    assert r"base\_1" in text
    assert text.count("{") == text.count("}")
    assert r"\textbf{" in text
    assert text.isascii()
    assert to_latex(differences_grid(result)).isascii()


def test_a_hostile_name_is_text_in_every_format():
    hostile = "<script>|x$_"
    groups, scores = {"avg": (hostile,)}, scores_of({"a": 0.4, "b": 0.6}, sets=(hostile,))
    result = make_result("main", spec("a", "b"), groups, scores)
    grid = main_grid(result, [], scores)
    assert "<script>" not in to_markdown(grid)
    assert r"\$\_" in to_latex(grid)
    page = render_template(
        "study.html.j2", title="t", kind="k", facts=[], reload_s=None, grids=[grid], plots=plot_columns(result, scores)
    )
    parser = Headers()
    parser.feed(page.partition("<main>")[2].partition("</table>")[0])
    assert parser.found == [hostile]


def test_a_plot_has_a_dot_for_each_arm_and_a_ring_for_each_seed():
    scores = scores_of({"base": 0.4, "good": 0.6})
    result = make_result("main", spec("base", "good"), GROUPS, scores)
    plots = plot_columns(result, scores)
    assert [plot.title for plot in plots] == ["main: math", "main: logic", "main: avg"]
    assert [len(trace.x) for trace in plots[0].figure.data] == [2, 6]
    assert [len(trace.x) for trace in plots[2].figure.data] == [2]
