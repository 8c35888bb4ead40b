"""A GPU without Transformer Engine trains and resumes: it gets every patch that is not for CPUs alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.support.dist.as_gpu import take_cpu_for_gpu
from tests.support.dist.resumed import joined, rank_write
from tests.support.dist.spawn import run_ranks
from tests.support.hf_models import make_hf_model


def rank_write_as_gpu(*args: Any) -> tuple[Any, ...]:
    """Train, save and resume as on a GPU; see ``rank_write``."""
    take_cpu_for_gpu()
    return rank_write(*args)


def test_experts_under_sequence_parallelism_resume_as_if_uninterrupted(tmp_path: Path) -> None:
    path = str(make_hf_model("qwen3_moe", tmp_path / "hf"))
    axes = {"tensor": 2, "sequence": True, "expert": 2}
    ranks = run_ranks(2, rank_write_as_gpu, path, axes, {"distributed": True}, str(tmp_path / "checkpoints"))
    uninterrupted = joined([weights for (_, weights), _, _ in ranks])
    resumed = joined([weights for _, _, ((_, weights), _, _) in ranks])
    assert resumed.keys() == uninterrupted.keys()
    for name, value in uninterrupted.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)
