"""Figures from records, and the choice of samples."""

import pytest

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.metrics.intervals import wilson_interval
from megatron_dypo.metrics.names import METRICS, Metric, lookup
from megatron_dypo.metrics.report.panels import PANELS, TIER_COLORS
from megatron_dypo.metrics.report.plots import MAX_BARS, MAX_POINTS, build_plots, thin
from megatron_dypo.metrics.report.sample_table import MAX_CHARS, MAX_ROWS, select_samples, shorten
from megatron_dypo.objective.metrics_page import all_metrics
from megatron_dypo.objective.recipes.registry import build_objective
from tests.support.run_folder import make_run, step_metrics


def _records(num_steps):
    return [{"step": step, **step_metrics(step)} for step in range(num_steps)]


def _by_title(records):
    return {plot.title: plot.figure for plot in build_plots(records)}


def test_every_metric_of_a_panel_is_in_the_table_of_names():
    names = [line.metric for panel in PANELS for line in panel.lines]
    assert [lookup(name, all_metrics()).name for name in names] == names


def test_plots_without_data_are_left_out():
    assert set(_by_title(_records(3))) == {
        "Held-out accuracy",
        "Reward",
        "Difficulty tiers",
        "Gradient norm",
        "Teachers drawn",
    }
    assert build_plots([]) == []
    assert build_plots([{"step": 0, "train/entropy": None}]) == []


def test_declared_metrics_are_drawn_in_the_panel_that_they_name_and_unknown_ones_alone():
    declared = [
        Metric("shape/mean", "fraction", "", panel="Shape"),
        Metric("shape/max", "fraction", "", panel="Shape"),
        Metric("shape/loss", "nats", "", panel="Loss terms"),
        Metric("gal/eta", "", "", panel="Shape"),
        Metric("shape/quiet", "", ""),
    ]
    names = [metric.name for metric in declared]
    records = [{"step": 0, "time": 1.5, **dict.fromkeys(names, 0.5), "train/lr": 1e-6, "mine/odd": 3.0}]
    figures = {plot.title: plot.figure for plot in build_plots(records, declared)}
    assert [line.name for line in figures["Shape"].data] == ["mean", "max"]
    assert figures["Shape"].layout.yaxis.title.text == "fraction"
    assert [line.name for line in figures["Loss terms"].data] == ["loss"]
    assert figures["mine/odd"].data[0].y == (3.0,)
    assert figures.keys() == {"Shape", "Loss terms", "GAL: η and saturation", "mine/odd"}


@pytest.mark.parametrize(("name", "shows_gal"), [("dypo", True), ("grpo", False), ("sft", False)])
def test_a_report_speaks_of_gal_only_if_the_objective_has_it(name, shows_gal):
    declared = build_objective(ObjectiveConfig(name=name)).metrics
    names = [metric.name for metric in (*METRICS, *declared) if "{" not in metric.name]
    plots = build_plots([{"step": 0, **dict.fromkeys(names, 0.5)}], declared)
    words = [
        text
        for plot in plots
        for text in (plot.title, plot.note, *(trace.name for trace in plot.figure.data))
        if "GAL" in text or "η" in text
    ]
    assert bool(words) is shows_gal, words


def test_a_plot_holds_the_values_of_the_records():
    reward = _by_title(_records(4))["Reward"].data[0]
    assert reward.x == (0, 1, 2, 3)
    assert reward.y == pytest.approx((0, 0.1, 0.2, 0.3))


def test_steps_without_a_value_are_left_out_of_a_line_and_zero_in_a_stack():
    records = [
        {"step": 0, "timing_s/gen": 1.0, "train/entropy": 0.5},
        {"step": 1, "timing_s/gen": 2.0, "timing_s/eval": 3.0, "train/entropy": None},
    ]
    figures = _by_title(records)
    assert figures["Policy entropy"].data[0].x == (0,)
    assert {bar.name: bar.y for bar in figures["Time of a step"].data} == {"rollouts": (1, 2), "evaluation": (0, 3)}


def test_tiers_keep_their_colors_when_one_is_missing():
    figure = _by_title([{"step": 0, "gate/easy": 0.5, "gate/hard": 0.5}])["Difficulty tiers"]
    assert {bar.name: bar.marker.color for bar in figure.data} == {
        "Easy": TIER_COLORS["easy"],
        "Hard": TIER_COLORS["hard"],
    }


def test_a_logarithmic_axis_gives_way_to_values_it_cannot_show():
    assert _by_title([{"step": 0, "train/grad_norm": 2.0}])["Gradient norm"].layout.yaxis.type == "log"
    assert _by_title([{"step": 0, "train/grad_norm": 0.0}])["Gradient norm"].layout.yaxis.type is None


def test_eval_accuracy_has_its_wilson_interval():
    line = _by_title(_records(1))["Held-out accuracy"].data[0]
    low, high = wilson_interval(0.5, 100)
    assert line.name == "held_out"
    assert line.y[0] + line.error_y.array[0] == pytest.approx(high, abs=1e-4)
    assert line.y[0] - line.error_y.arrayminus[0] == pytest.approx(low, abs=1e-4)


@pytest.mark.parametrize(("num_correct", "num_samples"), [(0, 20), (7, 20), (20, 20), (431, 1000)])
def test_wilson_interval_is_the_textbook_formula(num_correct, num_samples):
    z, p, n = 1.959963984540054, num_correct / num_samples, num_samples
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert wilson_interval(p, n) == pytest.approx((center - half, center + half), abs=1e-9)


def test_long_series_are_thinned_and_keep_their_ends():
    figures = _by_title(_records(5000))
    reward, tier = figures["Reward"].data[0], figures["Difficulty tiers"].data[0]
    assert (len(reward.x), len(tier.x)) == (MAX_POINTS, MAX_BARS)
    assert (reward.x[0], reward.x[-1], tier.x[0], tier.x[-1]) == (0, 4999, 0, 4999)


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 57])
def test_thin_keeps_order_and_takes_nothing_twice(size):
    kept = thin(range(size), 10)
    assert len(kept) == min(size, 10)
    assert kept == sorted(set(kept))


def test_shorten_keeps_both_ends_and_says_what_is_left_out():
    text = "a" * 600 + "the answer is 4"
    assert shorten(text, len(text)) == text
    short = shorten(text, 90)
    assert short.startswith("a" * 60 + "\n")
    assert short.endswith("the answer is 4")
    assert "[… 525 characters left out …]" in short


def test_selected_samples_are_bounded_in_rows_and_text(tmp_path):
    table = select_samples(make_run(tmp_path, 4, num_prompts=400, text="x" * 40_000 + "END"))
    texts = [text for row in table.rows for text in [row["prompt"], *(r["text"] for r in row["rollouts"])]]
    assert len(table.rows) == MAX_ROWS
    assert table.num_prompts_shown_steps == 1600
    assert sum(map(len, texts)) < 1.1 * MAX_CHARS
    assert all(text.endswith("END") for text in texts)


def test_a_short_run_is_shown_whole(tmp_path):
    table = select_samples(make_run(tmp_path, 3, num_prompts=5))
    assert [(row["step"], row["prompt_id"]) for row in table.rows] == [(s, f"p{i}") for s in range(3) for i in range(5)]
    assert (table.num_steps, table.num_steps_shown) == (3, 3)
