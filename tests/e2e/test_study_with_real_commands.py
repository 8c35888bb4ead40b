"""The script of the tiny study with the real commands: one server for all cells, tuning, final runs, page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megatron_dypo.metrics.records import read_metrics
from tests.support.e2e.commands import REPOSITORY, python

DEADLINE_S = 3000.0
STEPS, ITEMS = 2, 8


@pytest.mark.slow
@pytest.mark.timeout(DEADLINE_S)
def test_two_methods_with_two_rates_and_two_seeds_end_with_a_page_of_their_own_accuracies(tmp_path: Path) -> None:
    study = yaml.safe_load((REPOSITORY / "examples/tiny_study/study.yaml").read_text())
    kept = ("config", "baseline", "keep_server", "seconds")
    plan = {
        **{key: study[key] for key in kept},
        "title": "A small study",
        "command": "make small-study",
        "out": str(tmp_path / "out"),
        "page": str(tmp_path / "docs" / "small.md"),
        "server_port": 31790,
        "tasks": ["sorting"],
        "steps": STEPS,
        "learning_rates": [7.0e-4, 2.0e-3],
        "seeds": [1, 2],
        "methods": {name: {"objective.name": name} for name in ("sft", "dypo")},
        "shown": ["dypo"],
        "resamples": 399,
        "warmup_overrides": ["run.steps=5", "optimizer.warmup_steps=1"],
        "overrides": {**study["overrides"], "optimizer.warmup_steps": 1, "eval.max_prompts": ITEMS},
    }
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan, sort_keys=False))
    python(REPOSITORY / "examples/tiny_study/run.py", path, deadline_s=DEADLINE_S - 60)
    (found,) = json.loads((tmp_path / "docs/small/results.json").read_text())["tasks"].values()
    assert found["missing"] == {}
    assert found["rollouts"] == {"sft": 0.0, "dypo": STEPS * 16 * 8.0}
    cells = tmp_path / "out/sorting/final/cells"
    for estimate in found["tables"][0]["estimates"]:
        name = estimate["column"]
        if name == "out of distribution":
            continue
        seeds = [cells / estimate["row"] / f"seed-{seed}" / "run/metrics.jsonl" for seed in (1, 2)]
        lasts = [read_metrics(metrics)[-1] for metrics in seeds]
        assert all(last["step"] == STEPS and last[f"eval/{name}/num_samples"] == ITEMS for last in lasts)
        assert estimate["mean"] == pytest.approx(sum(last[f"eval/{name}/accuracy"] for last in lasts) / 2)
        assert (estimate["seeds"], estimate["items"]) == (2, ITEMS)
    assert "### main" in (tmp_path / "docs/small.md").read_text()
