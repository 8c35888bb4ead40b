"""An objective in a user's file, outside the package: it trains, and its stream and metrics reach every place."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.e2e.commands import REPOSITORY, finished, start, steps_of
from tests.support.e2e.parity_task import write_task

OBJECTIVE = REPOSITORY / "tests" / "support" / "throwaway_objective.py"
OWN = ("shape/mean", "shape/traces")


def trained(folder: Path, **sections: Any) -> dict[int, dict[str, float]]:
    """Return the records of a run with the throw-away objective, by step."""
    (folder / "my_package").mkdir()
    shutil.copy(OBJECTIVE, folder / "my_package" / "my_module.py")
    config = write_task(folder, **sections)
    output = finished(start("train", config, cwd=folder))
    assert "please report this" not in output
    return steps_of(folder / "run")


def objective(**options: object) -> dict[str, object]:
    return {"name": "my_package.my_module:ShapedTraces", "options": {"gamma": 0.2, **options}}


@pytest.mark.slow
def test_an_objective_of_one_file_trains_two_steps_on_traces(tmp_path: Path) -> None:
    records = trained(tmp_path, objective=objective(), parallel={"pipeline": 2})
    assert sorted(records) == [1, 2]
    for record in records.values():
        assert record["shape/traces"] == record["train/num_prompts"] == 8
        assert 0 < record["shape/mean"] <= 0.25, "γp/(p+γ)² is at most ¼"
        assert record["train/grad_norm"] > 0
        assert record["train/loss"] > 0
    assert records[1]["shape/mean"] != records[2]["shape/mean"], "the weights moved"
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for name in OWN:
        values = [event.value for event in events.Scalars(name)]
        assert values == pytest.approx([records[step][name] for step in (1, 2)])
    finished(start("report", "run", cwd=tmp_path))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Shape of traces" in page


@pytest.mark.slow
def test_an_objective_of_one_file_trains_on_rollouts_of_real_servers(tmp_path: Path) -> None:
    records = trained(tmp_path, objective=objective(rollouts=True))
    assert sorted(records) == [1, 2]
    for record in records.values():
        assert record["rollout/num_rollouts"] >= 32
        # If no group gives a sum, the step has no metric of it.
        traces = record["train/num_prompts"] * record["gate/offline_share_prompts"]
        assert record.get("shape/traces", 0.0) == pytest.approx(traces)
    assert any("train/pg_loss" in record for record in records.values())
