"""The report in a real browser, where one is installed."""

import re
import shutil
import subprocess

import pytest

from megatron_dypo.metrics.report.page import render_report
from tests.support.run_folder import HOSTILE, make_run

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or ""


@pytest.mark.skipif(not BROWSER, reason="no chromium or google-chrome on the path")
def test_plots_and_samples_are_drawn_and_hostile_text_is_inert(tmp_path):
    path = render_report(make_run(tmp_path / "run", 3, num_prompts=4, text=HOSTILE))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=10000", "--dump-dom", path.as_uri()]
    dom = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert "<title>run · DYPO report</title>" in dom
    assert len(re.findall(r'<tr class="row"', dom)) == 12
    assert len(re.findall(r'<svg class="main-svg"', dom)) >= 5
    assert '<img src="x"' not in dom
