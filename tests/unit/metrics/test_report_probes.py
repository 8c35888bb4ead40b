"""The probe's part of the report: verdicts, plots over probes, and files that cannot be shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dypo.metrics.report.page import render_report
from megatron_dypo.metrics.report.probes import dependence_rows, interval, probe_plots, read_probes, verdict_rows
from megatron_dypo.probe.gradients import Setting
from megatron_dypo.probe.result import analyse
from tests.support.probe_cases import Population, draw_rollouts, to_scores
from tests.support.run_folder import make_run


def result_at(step: int) -> dict[str, Any]:
    drawn = draw_rollouts(np.random.default_rng(step), Population(), prompts=8, repeats=3, group_size=4)
    traces = np.random.default_rng(step).standard_normal((8, 3, 6))
    setting = Setting(group_size=4, length_normalization="sum")
    return {**analyse(to_scores(drawn, traces=traces), setting, 0.5), "step": step}


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return [result_at(step) for step in (9, 10, 1_000_000)]


@pytest.fixture
def run(tmp_path: Path, results: list[dict[str, Any]]) -> Path:
    folder = make_run(tmp_path / "run", 3)
    (folder / "probe").mkdir()
    for result in results:
        (folder / "probe" / f"step_{result['step']:06d}.json").write_text(json.dumps(result))
    return folder


def test_probes_are_read_in_the_order_of_their_steps(run: Path) -> None:
    assert [result["step"] for result in read_probes(run)] == [9, 10, 1_000_000]


def test_the_plots_show_every_probe_with_its_interval(results: list[dict[str, Any]]) -> None:
    plots = {plot.title: plot.figure for plot in probe_plots(results)}
    assert len(plots) == 7
    variances = plots["Probe: variances"].data
    for trace, name in zip(variances, ("gal_to_grpo", "mix_to_grpo"), strict=True):
        assert trace.x == (9, 10, 1_000_000)
        for index, result in enumerate(results):
            one = result["moments"]["mid"]["ratios"][name]
            assert trace.y[index] == one["value"]
            assert trace.y[index] + trace.error_y.array[index] == pytest.approx(one["high"])
            assert trace.y[index] - trace.error_y.arrayminus[index] == pytest.approx(one["low"])
    assert plots["Probe: variance over α"].data[0].x == tuple(round(0.1 * i, 1) for i in range(11))
    assert plots["Probe: bias of m teachers"].data[0].x == (1.0, 1 / 2, 1 / 3)
    assert [trace.name for trace in plots["Probe: η"].data] == [f"reference {name}" for name in results[0]["margins"]]


def test_without_teachers_and_without_probes_there_is_nothing_to_show_of_them(results: list[dict[str, Any]]) -> None:
    assert probe_plots([]) == []
    alone = probe_plots([{**results[0], "teachers": None}])
    assert "Probe: bias of m teachers" not in [plot.title for plot in alone]


def test_the_page_has_the_verdicts_of_the_last_probe(run: Path, results: list[dict[str, Any]]) -> None:
    page = render_report(run).read_text()
    assert "Probe of step 1000000: assumptions of the paper" in page
    for row in verdict_rows(results[-1]):
        assert row["verdict"] in {"holds", "does not hold", "cannot be told"}
        assert row["verdict"] in page
    assert "assumptions of the paper" not in render_report(make_run(run.parent / "plain", 1)).read_text()


def test_the_page_has_the_dependence_on_the_setting(run: Path, results: list[dict[str, Any]]) -> None:
    rows, page = dependence_rows(results[-1]), render_report(run).read_text()
    assert {"group_size: 4", "length_normalization: group_mean", "reference: frozen"} <= {row[0] for row in rows}
    for row, found in zip(rows, results[-1]["sensitivity"], strict=True):
        assert row[6] == interval(found["correlation"])
        assert len(row) == len(found) - 1  # key and value share a cell
        assert "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" in page
    assert page.index("<th>correlation</th>") > page.index("Dependence on the setting")


def test_the_page_has_the_cost_of_a_probe_that_was_measured(run: Path, results: list[dict[str, Any]]) -> None:
    assert "Cost of this probe" not in render_report(run).read_text()
    cost = {"rollout_seconds": 1.5, "score_seconds": 2.5, "estimate_seconds": 1.0, "trajectories": 96}
    last = {**results[-1], "cost": {**cost, "response_tokens": 1234, "dimension": 6}}
    (run / "probe" / "step_1000000.json").write_text(json.dumps(last))
    assert "Cost of this probe: 5 s: 1.5 s for rollouts, 2.5 s for scores" in render_report(run).read_text()


def test_an_estimate_is_shown_with_what_is_known_of_it() -> None:
    assert interval({"value": 1.2345, "low": 0.5, "high": 2.0}) == "1.23 [0.5, 2]"
    assert interval({"value": 1.2345, "low": None, "high": None}) == "1.23"
    assert interval({"value": None, "low": None, "high": None}) == "–"


@pytest.mark.parametrize(
    ("text", "rule"), [("{", "not JSON"), ("[]", "format=None: must be 1"), ('{"format": 9}', "format=9")]
)
def test_a_file_that_cannot_be_shown_is_named(run: Path, text: str, rule: str) -> None:
    (run / "probe" / "step_000010.json").write_text(text)
    with pytest.raises(ValueError, match=rf"step_000010.json: .*{rule}|step_000010.json: {rule}"):
        render_report(run)
