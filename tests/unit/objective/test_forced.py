"""Plans of objectives whose rollouts continue the beginning of a trace: its length, and the rollouts that get it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from megatron_dypo.config.schedule import Schedule
from megatron_dypo.data.teachers import draw_share, draw_trace
from megatron_dypo.objective.recipes.registry import build_objective
from megatron_dypo.rollout.plan import GroupPart, GroupPlan
from megatron_dypo.types import Prompt, Verdict
from tests.support.present import present
from tests.support.rival_cases import config_of

LENGTH = 1000


def prompt(number: int, visit: int = 0, length: int = LENGTH) -> Prompt:
    traces = {name: np.arange(length, dtype=np.int32) + start for name, start in (("a", 0), ("b", 10_000))}
    return Prompt(
        prompt_id=f"p{number}", visit=visit, order=number, tokens=np.array([1], np.int32), text="q", answer="1",
        source="s", traces=traces if length else {},
    )  # fmt: skip


def plan_of(preset: str, row: Prompt, *, step: int = 0, k: int = 8, seed: int = 7, **options: Any) -> GroupPlan:
    return build_objective(config_of(preset=preset, **options)).plan_group(row, k, step=step, seed=seed)


@pytest.mark.parametrize("step", [0, 250, 500, 900])
def test_the_prefix_is_uniform_between_a_low_that_falls_by_a_cosine_and_the_high(step: int) -> None:
    low = Schedule(start=0.95, end=0.05, steps=500, shape="cosine").at(step)
    lengths = [len(plan_of("prefix_rft_paper", prompt(i), step=step).first[1].prefix) for i in range(400)]
    if step == 0:
        assert set(lengths) == {950}
        return
    assert min(lengths) >= int(low * LENGTH)
    assert max(lengths) <= 950
    spread = stats.uniform(low * LENGTH, (0.95 - low) * LENGTH)
    assert stats.kstest(lengths, spread.cdf).pvalue > 0.01


def test_a_prefix_is_a_function_of_seed_prompt_visit_and_step_alone() -> None:
    def prefix(row: Prompt, **options: int) -> list[int]:
        return plan_of("prefix_rft_paper", row, **{"step": 300, **options}).first[1].prefix.tolist()

    assert prefix(prompt(1)) == prefix(prompt(1))
    different = [prefix(prompt(1)), prefix(prompt(2)), prefix(prompt(1, visit=1)), prefix(prompt(1), seed=8)]
    assert len({tuple(one) for one in different}) == 4
    trace = present(draw_trace(prompt(1), 7))[1].tolist()
    assert prefix(prompt(1)) == trace[: len(prefix(prompt(1)))]


def test_how_long_a_prefix_is_says_nothing_of_whose_it_is() -> None:
    rows = [prompt(i) for i in range(2000)]
    is_long = [draw_share(row, 3, 0.0, 1.0) > 0.5 for row in rows]
    counts = Counter(zip(is_long, (present(draw_trace(row, 3))[0] for row in rows), strict=True))
    table = [[counts[long, name] for name in "ab"] for long in (False, True)]
    assert stats.chi2_contingency(table).pvalue > 0.01


@pytest.mark.parametrize("preset", ["prefix_rft_paper", "trapo_paper"])
def test_a_prompt_without_a_trace_gives_a_whole_group_of_its_own_rollouts(preset: str) -> None:
    plan = plan_of(preset, prompt(1, length=0))
    assert [(part.count, len(part.prefix)) for part in plan.first] == [(8, 0)]
    assert plan.then is None


@pytest.mark.parametrize("preset", ["prefix_rft_paper", "trapo_paper"])
def test_a_trace_of_one_token_leaves_nothing_to_go_on_from(preset: str) -> None:
    plan = plan_of(preset, prompt(1, length=1))
    parts = [*plan.first, *(plan.then([wrong()] * 4) if plan.then else ())]
    assert not any(len(part.prefix) for part in parts)


def wrong() -> Verdict:
    return Verdict(is_correct=False, reward=0.0)


def right() -> Verdict:
    return Verdict(is_correct=True, reward=1.0)


def micro_groups(preset: str, rights: Sequence[int], k: int = 8) -> list[tuple[int, int, bool]]:
    """Return (count, prefix, whole) of each micro-group if that many of its rollouts are right."""
    plan, verdicts, found = plan_of(preset, prompt(1), k=k), list[Verdict](), list[tuple[int, int, bool]]()
    parts: Sequence[GroupPart] = plan.first
    for count in rights:
        (part,) = parts
        found.append((part.count, len(part.prefix), part.is_whole))
        verdicts += [right()] * count + [wrong()] * (part.count - count)
        parts = present(plan.then)(verdicts)
    assert parts == ()
    return found


@pytest.mark.parametrize(
    ("preset", "rights", "expected"),
    [
        ("trapo_paper", (0, 0, 0, 0), [(4, 0, False), (2, 200, False), (1, 500, False), (1, LENGTH, True)]),
        ("trapo_paper", (2, 2, 1, 1), [(4, 0, False), (2, 0, False), (1, 500, False), (1, LENGTH, True)]),
        ("trapo_paper", (4, 1, 1, 0), [(4, 0, False), (2, 0, False), (1, 0, False), (1, LENGTH, True)]),
        ("trapo_paper", (4, 2, 1, 1), [(4, 0, False), (2, 0, False), (1, 0, False), (1, 0, False)]),
        ("trapo_code", (1, 2, 1, 1), [(4, 0, False), (2, 250, False), (1, 500, False), (1, LENGTH, True)]),
        ("trapo_code", (2, 2, 1, 0), [(4, 0, False), (2, 0, False), (1, 0, False), (1, LENGTH, True)]),
        ("trapo_code", (4, 2, 1, 0), [(4, 0, False), (2, 0, False), (1, 0, False), (1, 0, False)]),
    ],
)
def test_a_micro_group_gets_its_share_of_the_trace_where_the_rewards_so_far_are_below_the_threshold(
    preset: str, rights: tuple[int, ...], expected: list[tuple[int, int, bool]]
) -> None:
    assert micro_groups(preset, rights) == expected


def test_micro_groups_grow_with_the_group() -> None:
    assert [count for count, _, _ in micro_groups("trapo_paper", (0, 0, 0, 0), k=16)] == [8, 4, 2, 2]


def test_sizes_that_cannot_be_split_and_a_ratio_of_whole_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rollout\.group_size=12: must be a multiple of 8"):
        build_objective(config_of(preset="trapo_paper")).num_rollouts(12)
    with pytest.raises(ValueError, match=r"rollout\.group_size=2: must be at least 3"):
        build_objective(config_of(preset="prefix_rft_paper")).num_rollouts(2)
    for preset in ("trapo_paper", "prefix_rft_paper"):
        with pytest.raises(ValueError, match=r"objective\.ratio=sequence: must be token"):
            build_objective(config_of(preset=preset, ratio="sequence"))
    for options, message in (
        ({"high": 1.0}, r"high=1\.0.*in \(0, 1\)"),
        ({"keep": 0}, "keep=0"),
        ({"low": 0.99}, "low="),
    ):
        with pytest.raises(ValueError, match=message):
            build_objective(config_of(name="prefix_rft", options=options))
