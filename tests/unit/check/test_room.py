"""The disk space that a run needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_dypo.check.room import room_needed
from megatron_dypo.models.architecture import load_architecture
from megatron_dypo.planning.parameters import whole_model
from tests.support.check_cases import case


@pytest.mark.parametrize(
    ("sections", "copies", "bytes_each", "exported"),
    [
        ({"run": {"steps": 100}, "checkpoint": {"every": 10, "keep": 2}}, 3, 4 + 8, 4),
        ({"run": {"steps": 100}, "checkpoint": {"every": 10, "keep": 0}}, 10, 4 + 8, 4),
        ({"run": {"steps": 100}, "checkpoint": {"every": 10, "keep": 1, "keep_every": 50}}, 4, 4 + 8, 4),
        ({"run": {"steps": 100}, "checkpoint": {"every": 10, "keep_best": {"metric": "m"}}}, 4, 4 + 8, 4),
        ({"run": {"steps": 5}, "checkpoint": {"every": 0}}, 1, 4 + 8, 4),
        ({"run": {"steps": 5}, "checkpoint": {"every": 2}, "export": {"hf": False}}, 3, 4 + 8, 0),
        ({"run": {"steps": 1}, "model": {"dtype": "bfloat16"}}, 1, 2 + 4 + 8, 2),
        ({"run": {"steps": 1}, "objective": {"reference": {"mode": "refreshed"}}}, 1, 4 + 8 + 4, 4),
    ],
)
def test_room_is_for_the_checkpoints_that_are_kept_one_more_and_the_export(
    sections: dict[str, Any], copies: int, bytes_each: int, exported: int, tmp_path: Path
) -> None:
    config = case(tmp_path, **sections)
    count = whole_model(load_architecture(config.model.hf_path)).total
    needed, _ = room_needed(config, count)
    assert needed == count * (copies * bytes_each + exported)
