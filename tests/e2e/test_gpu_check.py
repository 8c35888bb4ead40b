"""Every stage of the check of a GPU machine, in small, on a machine without one."""

from __future__ import annotations

import json

import pytest
import torch

from tests.support.tool_commands import run_tool

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what happens where there is no GPU")


@pytest.mark.slow  # five minutes, for a tool that only GPU machines need
def test_every_stage_meets_its_bars_in_small(tmp_path):
    done = run_tool("gpu_check.py", "--cpu-smoke", "--out", tmp_path / "check", timeout=1500.0)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "check" / "result.json").read_text())
    stages = result["stages"]
    assert list(stages) == [
        "environment",
        "kernels",
        "updates",
        "memory",
        "resumed",
        "quickstart",
        "transports",
        "layouts",
        "lost_server",
    ]
    assert all("skipped" not in stage for stage in stages.values())
    assert {"torch", "megatron-core"} <= set(result["versions"])
    updates = stages["updates"]["updates"]
    assert list(updates) == ["float32", "bf16"]
    losses = updates["float32"]["losses"]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert updates["bf16"]["against"]["gradient_cosine"] > 0.999
    assert 0 < updates["bf16"]["against"]["score_gap_mean"] < 0.05
    assert {name: one["gap"] for name, one in stages["resumed"]["resumed"].items()} == {"float32": 0, "bf16": 0}
    assert set(stages["transports"]["transports"]) == {"local", "disk", "p2p", "broadcast"}
    assert set(stages["layouts"]["layouts"]) == {"TP2", "TP2, SP", "PP2", "CP2", "EP2", "experts, TP2, SP"}
    assert stages["lost_server"]["killed"]
    page = (tmp_path / "check" / "page.md").read_text()
    assert "missed" not in page
    again = run_tool("gpu_check.py", "--cpu-smoke", "--out", tmp_path / "check")
    assert again.stdout.count("done before") == len(stages)
