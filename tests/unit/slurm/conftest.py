"""A job without Slurm."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.slurm_job import Job


@pytest.fixture
def job(tmp_path: Path) -> Job:
    logs = tmp_path / "dypo" / "12.1"
    for folder in ("ends", "ended", "bad", "well"):
        (logs / folder).mkdir(parents=True)
    return Job(logs=logs)
