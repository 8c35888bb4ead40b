"""The comparisons among the examples: every cell has a config that its objective takes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from megatron_dypo.objective.recipes.registry import OBJECTIVES, build_objective
from megatron_dypo.study.compare import open_comparison

ROOT = Path(__file__).parents[3]
NEEDS_A_TEACHER_MODEL = {"opd"}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "comparison").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_cell_has_a_config_that_its_objective_takes(path: Path) -> None:
    for cell in open_comparison(path).cells:
        build_objective(cell.config.objective)


def test_the_comparison_of_all_objectives_has_each_one_with_two_seeds() -> None:
    cells = open_comparison(ROOT / "examples" / "comparison" / "all_objectives.yaml").cells
    names = OBJECTIVES.keys() - NEEDS_A_TEACHER_MODEL
    assert Counter(cell.config.objective.name for cell in cells) == dict.fromkeys(names, 2)
    assert {f"{cell.config.run.steps}_steps" for cell in cells} == {cell.arm.data for cell in cells}
