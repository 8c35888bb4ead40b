"""The example of ablations: each row is a config of its own that builds an objective and gives tokens weights."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from megatron_dypo.config.reading.load import dump_config, load_config
from megatron_dypo.objective.recipes.registry import build_objective
from megatron_dypo.types import SampleKind
from tests.support.objective_cases import random_groups, totals_of

ROOT = Path(__file__).parents[3]


def load_run() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ablation_run", ROOT / "examples" / "ablation" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RUN = load_run()
SPEC = RUN.read_spec()


def resolved(row: str) -> str:
    config = load_config(ROOT / SPEC["config"], RUN.overrides_of(SPEC, row, 1))
    return dump_config(dataclasses.replace(config, run=dataclasses.replace(config.run, dir="same")))


def test_every_row_is_another_config() -> None:
    configs = {row: resolved(row) for row in SPEC["methods"]}
    assert len(set(configs.values())) == len(configs)
    base = load_config(ROOT / SPEC["config"])
    assert configs["dypo"] == dump_config(dataclasses.replace(base, run=dataclasses.replace(base.run, dir="same")))


@pytest.mark.parametrize("row", SPEC["methods"])
def test_every_row_gives_its_tokens_weights(row: str) -> None:
    objective = build_objective(load_config(ROOT / SPEC["config"], RUN.overrides_of(SPEC, row, 1)).objective)
    groups = random_groups(0)
    if not objective.needs_rollouts(0):
        groups = [group for group in groups if group[0].kind is SampleKind.TRACE]
    if row in ("rl", "no_gate", "sft_and_rl"):
        groups = [group for group in groups if group[0].kind is SampleKind.ROLLOUT]
    for group in groups:
        weights = objective.weights_of(group, totals_of(groups), 0).weights
        assert all(any(own.get(name) for name in ("pg_weight", "nll_weight")) for own in weights)


def test_the_tables_hold_every_row() -> None:
    assert {row for table in SPEC["tables"].values() for row in table["methods"]} == set(SPEC["methods"])


def test_a_row_that_was_not_run_says_so_and_one_that_was_shows_its_last_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RUN, "ROOT", tmp_path)
    folder = tmp_path / RUN.run_dir(SPEC, "dypo", 1)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "eval/heldout/accuracy": 0.25}\n{"step": 2, "eval/heldout/accuracy": 0.5}\n{"step": 3}\n'
    )
    shown = RUN.table(SPEC, ["dypo", "rl"]).splitlines()
    assert shown[0].split() == ["dypo", "heldout", "50.0"]
    assert shown[1].split() == ["rl", "(not", "run)"]
