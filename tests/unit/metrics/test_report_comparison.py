"""The comparison of several runs: aligned names, config differences, figures at the end, one curve for each run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.metrics.names import lookup
from megatron_dypo.metrics.report.comparison import (
    COMPARED,
    Row,
    Run,
    config_differences,
    end_figures,
    overlaid_plots,
    render_comparison,
    run_names,
)
from megatron_dypo.objective.recipes.registry import build_objective
from tests.support.run_folder import HOSTILE, make_run, step_metrics


def run_of(name: str, *, accuracy: float, config: dict[str, object] | None = None, num_steps: int = 3) -> Run:
    records = [{"step": step, **step_metrics(step), "eval/held_out/accuracy": accuracy} for step in range(num_steps)]
    return Run(name=name, records=records, config=config or {}, ending="")


def test_names_are_the_shortest_ends_that_differ() -> None:
    assert run_names([Path("/runs/one"), Path("/runs/two")]) == ["one", "two"]
    assert run_names([Path("/a/dypo"), Path("/b/dypo"), Path("/b/grpo")]) == ["a/dypo", "b/dypo", "b/grpo"]


def test_a_folder_that_is_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="a run folder is given twice"):
        run_names([Path("/runs/one"), Path("/runs/one")])


def test_only_keys_that_differ_are_listed_and_a_key_that_is_missing_is_shown() -> None:
    one = run_of("one", accuracy=0.5, config={"optimizer.lr": 1e-6, "run.seed": 1, "old.key": True})
    two = run_of("two", accuracy=0.5, config={"optimizer.lr": 5e-7, "run.seed": 1})
    assert config_differences([one, two]) == [
        Row(label="optimizer.lr", cells=("1.0e-06", "5.0e-07")),
        Row(label="old.key", cells=("true", "–")),
    ]


def test_figures_at_the_end_have_the_last_accuracy_with_its_interval() -> None:
    rows = {row.label: row.cells for row in end_figures([run_of("one", accuracy=0.5), run_of("two", accuracy=0.8)])}
    assert rows["accuracy on held_out, last"] == (
        "50.0% (40.4% – 59.6%), step 2",
        "80.0% (71.1% – 86.7%), step 2",
    )
    assert rows["Mid, mean of the last 5 steps"] == ("50%", "50%")
    assert rows["end"] == ("goes on", "goes on")
    assert "log-prob gap, mean of the last 5 steps" not in rows


def test_each_plot_has_a_line_of_its_own_colour_for_each_run_that_has_data() -> None:
    empty = Run(name="empty", records=[], config={}, ending="")
    plots = {
        plot.title: plot.figure
        for plot in overlaid_plots([run_of("one", accuracy=0.5), run_of("two", accuracy=0.8), empty])
    }
    lines = plots["Accuracy on held_out"].data
    assert [line.name for line in lines] == ["one", "two"]
    assert len({line.line.color for line in lines}) == 2
    assert list(lines[1].y) == [0.8, 0.8, 0.8]
    assert "Throughput" not in plots


def test_what_is_compared_are_metrics_of_the_table() -> None:
    for metric, _ in COMPARED:
        assert lookup(metric, build_objective(ObjectiveConfig(name="dypo")).metrics).name == metric


def test_the_page_shows_each_run_and_hostile_values_are_inert(tmp_path: Path) -> None:
    for name, rate in (("one", "1.0e-06"), ("two", HOSTILE)):
        make_run(tmp_path / name, num_steps=2)
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump({"optimizer": {"lr": rate}}), encoding="utf-8")
    path = render_comparison([tmp_path / "one", tmp_path / "two"], tmp_path / "pages" / "both.html")
    page = path.read_text(encoding="utf-8")
    assert "<title>one · two · DYPO report</title>" in page
    assert "<td>optimizer.lr</td>" in page
    assert "<script>document.title" not in page
    assert "&lt;script&gt;document.title" in page
    assert page.count("plotly.js v") == 1
    assert 'http-equiv="refresh"' not in page


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "one", num_steps=1)
    with pytest.raises(ValueError, match=r"two: not a run folder: it has no metrics\.jsonl"):
        render_comparison([tmp_path / "one", tmp_path / "two"], tmp_path / "both.html")
