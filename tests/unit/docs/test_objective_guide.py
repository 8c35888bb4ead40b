"""The guide to objectives shows the file that the tests train with."""

from pathlib import Path

from megatron_dypo.objective.recipes.base import Objective
from megatron_dypo.objective.streams import STREAMS

ROOT = Path(__file__).parents[3]
GUIDE = (ROOT / "docs" / "adding_an_objective.md").read_text(encoding="utf-8")


def test_the_guides_example_is_the_objective_that_tests_train_with():
    example = (ROOT / "tests" / "support" / "throwaway_objective.py").read_text(encoding="utf-8")
    assert f"```python\n{example}```" in GUIDE


def test_the_guide_names_every_part_of_an_objective_and_every_stream():
    parts = [name for name in vars(Objective) if not name.startswith("_")]
    assert len(parts) >= 9
    for name in (*parts, *(stream.name for stream in STREAMS if stream.read is None)):
        assert f"`{name}" in GUIDE, name
