"""The examples at real sizes: their model folders hold the published sizes, and the plan approves of their configs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_dypo.config.reading.load import load_config
from megatron_dypo.launch.start import check_inputs
from megatron_dypo.models.architecture import load_architecture
from megatron_dypo.planning.devices import find_gpu
from megatron_dypo.planning.plan import as_data, make_plan
from megatron_dypo.planning.setting import make_setting

ROOT = Path(__file__).parents[3]
EXAMPLES = {"examples/llama3_70b/config.yaml": 8, "examples/qwen2_5_math_7b/dypo.yaml": 1}
"""Config → nodes that train."""
OUR_CHANGES = {"max_position_embeddings": 16384, "rope_theta": 40000.0}
"""Changes of config.json that the README of the 7B example asks for."""


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def planned(config: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    setting = make_setting(
        load_config(ROOT / config, overrides), find_gpu("h100-80gb"), nodes=EXAMPLES[config], gpus_per_node=8
    )
    plan = make_plan(setting)
    assert not plan.problems()
    return as_data(plan)


def spare(plan: dict[str, Any]) -> float:
    """Return the share of a GPU's memory that stays free on the fullest rank."""
    return min(1 - footprint["total"] / footprint["capacity"] for footprint in plan["memory_bytes"])


@pytest.mark.parametrize("name", ["llama3_70b", "qwen2_5_math_7b"])
def test_sizes_are_the_published_ones_but_for_the_changes_that_are_named(name: str) -> None:
    published = json.loads((ROOT / "tests/planning_configs" / name / "config.json").read_text())
    shipped = json.loads((ROOT / "examples" / name / "model" / "config.json").read_text())
    changed = {key: shipped[key] for key, value in published.items() if shipped[key] != value}
    assert changed == (OUR_CHANGES if name == "qwen2_5_math_7b" else {})
    assert load_architecture(ROOT / "examples" / name / "model").hidden_size == published["hidden_size"]


@pytest.mark.parametrize("config", EXAMPLES)
def test_a_fresh_clone_lacks_nothing_but_weights_and_data(config: str) -> None:
    notes = check_inputs(load_config(ROOT / config))
    assert notes
    assert all(note.startswith(("model.hf_path", "data.prompts", "eval.sets")) for note in notes)
    assert not any("config.json" in note for note in notes)


@pytest.mark.parametrize("config", EXAMPLES)
def test_the_new_weights_travel_by_the_best_way_there_is(config: str) -> None:
    assert load_config(ROOT / config).refit.transport == "auto"


@pytest.mark.parametrize("config", EXAMPLES)
def test_a_tenth_of_the_memory_stays_free_and_no_recomputation_is_faster(config: str) -> None:
    shipped = planned(config)
    assert spare(shipped) >= 0.1
    for recompute in ("none", "selective", "full"):
        other = planned(config, [f"model.recompute={recompute}"])
        assert shipped["step"]["total_s"] <= other["step"]["total_s"]


def test_the_readme_of_the_7b_example_says_what_the_plan_says() -> None:
    config = "examples/qwen2_5_math_7b/dypo.yaml"
    readme = (ROOT / "examples/qwen2_5_math_7b/README.md").read_text()
    shipped, single = planned(config), planned(config, ["rollout.servers.urls=[http://sglang-0:30000]"])
    assert f"{shipped['step']['total_s']:.0f} s a step, of which {shipped['step']['rollout_s']:.0f} s" in readme
    assert f"{single['step']['total_s']:.0f} s a step" in readme


def test_the_page_on_planning_has_the_plans_of_the_70b_example() -> None:
    page = (ROOT / "docs" / "planning.md").read_text()
    rows = re.findall(r"\| `(\w+)` \| ([\d,]+)[^|]*\| ([\d.]+) GiB \| ([\d.]+) s \|", page)
    assert len(rows) == 3
    for recompute, tokens, spare_gib, update_s in rows:
        overrides = [f"model.recompute={recompute}", f"batching.tokens_per_microbatch={tokens.replace(',', '')}"]
        plan = planned("examples/llama3_70b/config.yaml", overrides)
        fullest = max((f for f in plan["memory_bytes"] if "trainer" in f["where"]), key=lambda f: f["total"])
        assert f"{(fullest['capacity'] - fullest['total']) / 2**30:.1f}" == spare_gib
        assert f"{plan['step']['update_s']:.1f}" == update_s


def test_the_papers_example_has_its_group_size_and_its_alpha() -> None:
    config = load_config(ROOT / "examples/qwen2_5_math_7b/dypo.yaml")
    assert (config.rollout.group_size, config.objective.alpha) == (8, 0.5)
