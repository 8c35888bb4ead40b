"""The plan counts what the objective samples and learns from, as the loop does."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.objective.recipes.registry import OBJECTIVES, build_objective
from megatron_dypo.objective.route import route
from megatron_dypo.planning.groups import mean_group
from megatron_dypo.planning.rollouts import rollout_round
from megatron_dypo.planning.step import step_time
from megatron_dypo.types import SampleKind, Tier
from tests.support.graded_groups import graded
from tests.support.planning_cases import from_file

K, STEP = 8, 9
SHARES = {Tier.EASY: 0.25, Tier.MID: 0.5, Tier.HARD: 0.25}
OPTIONS: dict[str, dict[str, Any]] = {"sft_then_rl": {"sft_steps": 5}}


def planned(name: str, k: int = K, **options: Any) -> Any:
    return mean_group(ObjectiveConfig(name=name, **OPTIONS.get(name, {}), **options), k, SHARES, step=STEP)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_a_planned_group_is_the_mean_of_those_that_the_loop_routes(name: str) -> None:
    objective = build_objective(ObjectiveConfig(name=name, **OPTIONS.get(name, {})))
    k = objective.num_rollouts(K) if objective.needs_rollouts(STEP) else 0
    right = {Tier.EASY: [True] * k, Tier.MID: [True] * (k // 2) + [False] * (k - k // 2), Tier.HARD: [False] * k}
    learned = sequences = rollouts = 0.0
    for tier, share in SHARES.items():
        group = dataclasses.replace(graded(0, right[tier]), tier=tier if k else None)
        (samples,) = route([group], objective, step=STEP, version=STEP, seed=1).samples
        learned += share * bool(samples)
        sequences += share * len(samples)
        rollouts += share * sum(sample.kind is SampleKind.ROLLOUT for sample in samples)
    found = planned(name)
    assert (found.rollouts, found.learned) == (k, learned)
    assert found.sequences == pytest.approx(sequences)
    assert found.learned_rollouts == pytest.approx(rollouts)


@pytest.mark.parametrize(
    ("name", "rollouts", "learned", "sequences"),
    [
        ("dypo", 8, 0.75, 0.5 * 8 + 0.25),
        ("grpo", 8, 1.0, 8.0),
        ("luffy", 7, 1.0, 8.0),
        ("chord", 8, 1.0, 9.0),
        ("hpt", 8, 1.0, 0.75 * 8 + 0.25),
        ("sft", 0, 1.0, 1.0),
        ("planned_objective:Mine", 8, 0.75, 0.5 * 8 + 0.25),
    ],
)
def test_counts_of_known_objectives(
    name: str, rollouts: int, learned: float, sequences: float, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "planned_objective.py").write_text(
        "from megatron_dypo.objective.recipes.grpo import Grpo\n\n\n"
        "class Mine(Grpo):\n    def treat(self, group, step):\n        return group.prompt.row['treatment']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = planned(name)
    assert (found.rollouts, found.learned, found.sequences) == (rollouts, learned, sequences)


def test_a_plan_counts_one_rollout_less_where_a_trace_takes_its_place() -> None:
    whole, less = (step_time(from_file("llama3_70b", f"objective.name={name}")) for name in ("grpo", "luffy"))
    assert less.generated == pytest.approx(whole.generated * 7 / 8)
    assert less.tokens == pytest.approx(whole.tokens), "the trace is in the update"
    assert less.rollout < whole.rollout
    assert less.logprobs < whole.logprobs


def test_a_plan_of_an_objective_without_rollouts_samples_nothing() -> None:
    setting = from_file("llama3_70b", "objective.name=sft")
    time = step_time(setting)
    assert (time.rollout, time.generated, time.aborted, time.logprobs) == (0, 0, 0, 0)
    assert rollout_round(setting).prompts == setting.config.rollout.prompts_per_round
    assert time.update.total > 0


def test_a_group_size_that_the_objective_cannot_use_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rollout\.group_size=2: must be at least 3"):
        planned("luffy", 2)
