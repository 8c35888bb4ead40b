"""The report and the comparison in a real browser, if one is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from megatron_dypo.metrics.report.comparison import render_comparison
from megatron_dypo.metrics.report.page import render_report
from tests.support.run_folder import HOSTILE, make_run

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or ""

pytestmark = pytest.mark.skipif(not BROWSER, reason="no chromium or google-chrome on the path")


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the folder of a browser's settings, at the first start in this module."""
    return tmp_path_factory.mktemp("profile")


def dom_of(page: Path, profile: Path) -> str:
    """Return the document that a browser makes of ``page`` once its scripts have run."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += ["--virtual-time-budget=10000", "--dump-dom", page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def click_first_row(page: Path) -> None:
    """Append a script to a report that opens its first prompt; only scripts with the page's nonce run."""
    (nonce,) = re.findall(r"script-src 'nonce-([^']+)'", page.read_text(encoding="utf-8"))
    with page.open("a", encoding="utf-8") as file:
        file.write(f"""<script nonce="{nonce}">document.querySelector("tr.row").click()</script>""")


def test_plots_and_samples_are_drawn_and_hostile_text_is_inert(tmp_path: Path, profile: Path) -> None:
    page = render_report(make_run(tmp_path / "run", 3, num_prompts=4, text=HOSTILE))
    click_first_row(page)
    dom = dom_of(page, profile)
    assert "<title>run · DYPO report</title>" in dom
    assert len(re.findall(r'<tr class="row"', dom)) == 12
    assert len(re.findall(r'<svg class="main-svg"', dom)) >= 5
    (opened,) = re.findall(r'<td class="open".*?</td>', dom, re.DOTALL)
    assert (opened.count("✓ correct"), opened.count("✗ wrong")) == (1, 2), "of two rollouts and the trace"
    assert re.search(r"Teacher's trace<span class=\"wrong-mark\">✗ wrong</span><small>terse · reward -0.25<", opened)
    assert '<img src="x"' not in dom


def test_runs_are_compared_in_tables_and_plots_and_a_hostile_config_is_inert(tmp_path: Path, profile: Path) -> None:
    runs = [make_run(tmp_path / name, 3) for name in ("one", "two")]
    (runs[1] / "config.yaml").write_text(yaml.safe_dump({"run": {"dir": HOSTILE}}), encoding="utf-8")
    dom = dom_of(render_comparison(runs, tmp_path / "comparison.html"), profile)
    assert "<title>one · two · DYPO report</title>" in dom
    assert len(re.findall(r'<table class="compared"', dom)) == 2
    assert "<td>run.dir</td><td>–</td>" in dom
    assert len(re.findall(r'<svg class="main-svg"', dom)) >= 6, "accuracy, reward, three tiers, gradient norm"
    assert '<img src="x"' not in dom
