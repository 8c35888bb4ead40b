"""Groups that are sampled in parts: after a teacher's tokens, and depending on the verdicts of earlier rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from megatron_dypo.grading.verify import grade
from megatron_dypo.rollout.collect import collect
from megatron_dypo.rollout.groups import Planner
from megatron_dypo.rollout.plan import GroupPart, GroupPlan
from megatron_dypo.types import DropReason, Prompt, RolloutGroup, Verdict
from tests.support.fake_sglang import FakeSGLang
from tests.support.rollout.clients import make_client, make_prompts

TRACE = np.array([60, 61, 62, 63, 2], np.int32)


def verdict(reward: float, error: str | None = None) -> Verdict:
    return Verdict(is_correct=reward > 0, reward=reward, error=error)


def never(group: RolloutGroup) -> Sequence[Verdict]:
    raise AssertionError("no part waits for a verdict")


def planner(plan: Callable[[Prompt], GroupPlan], judge: Callable[[RolloutGroup], Sequence[Verdict]] = never) -> Planner:
    return Planner(plan=plan, judge=judge)


def sampled(
    fake: FakeSGLang, plan: GroupPlan, judge: Callable[[RolloutGroup], Sequence[Verdict]] = never, **options: Any
) -> tuple[list[RolloutGroup], Any]:
    prompts = make_prompts(1)
    return collect(
        prompts,
        make_client([fake.url]),
        group_size=4,
        planner=planner(lambda _: plan, judge),
        progress=False,
        **options,
    )


def test_a_rollout_behind_a_prefix_is_the_prefix_and_what_the_server_adds_to_prompt_and_prefix() -> None:
    plan = GroupPlan(first=(GroupPart(count=2), GroupPart(count=1, prefix=TRACE[:3])))
    with FakeSGLang() as fake:
        ((group,), stats) = sampled(fake, plan, max_new_tokens=8)
        requests = sorted(fake.requests, key=lambda body: len(body["input_ids"]))
    (prompt,) = make_prompts(1)
    assert [body["input_ids"] for body in requests] == [prompt.tokens.tolist(), [*prompt.tokens, 60, 61, 62]]
    assert [body["sampling_params"]["n"] for body in requests] == [2, 1]
    assert [body["sampling_params"]["max_new_tokens"] for body in requests] == [8, 5]
    *own, behind = group.rollouts
    assert [one.num_forced_tokens for one in group.rollouts] == [0, 0, 3]
    assert behind.tokens.tolist() == [60, 61, 62, 62, 0, 2]
    assert behind.logp.tolist()[3:] == [-1.0, -2.0, -3.0]
    assert np.isnan(behind.logp[:3]).all()
    assert behind.text == make_client([fake.url]).decode(behind.tokens)
    assert behind.version_spans == ((0, 3),)
    assert [one.tokens.tolist()[1] for one in own] == [0, 1]
    assert (stats.rollouts, group.verdicts) == (3, ())


@pytest.mark.parametrize("limit", [1, 2, 4])
def test_a_prefix_leaves_the_policy_a_token_at_least(limit: int) -> None:
    plan = GroupPlan(first=(GroupPart(count=1, prefix=TRACE),))
    with FakeSGLang(lambda _, body: "length") as fake:
        _, stats = sampled(fake, plan, max_new_tokens=limit)
        body = fake.requests[0]
    assert len(body["input_ids"]) == len(make_prompts(1)[0].tokens) + limit - 1
    assert body["sampling_params"]["max_new_tokens"] == 1
    assert stats.dropped  # the fake server's answers have three tokens


def test_later_parts_follow_from_the_verdicts_of_all_before_and_each_rollout_is_judged_once() -> None:
    asked, judged = list[list[float]](), list[int]()

    def then(verdicts: Sequence[Verdict]) -> Sequence[GroupPart]:
        asked.append([one.reward for one in verdicts])
        parts = {2: (GroupPart(count=1, prefix=TRACE[:1]),), 3: (GroupPart(count=1, prefix=TRACE, is_whole=True),)}
        return parts.get(len(verdicts), ())

    def judge(group: RolloutGroup) -> Sequence[Verdict]:
        judged.extend(one.num_forced_tokens for one in group.rollouts)
        return [verdict(one.num_forced_tokens) for one in group.rollouts]

    with FakeSGLang() as fake:
        ((group,), _) = sampled(fake, GroupPlan(first=(GroupPart(count=2),), then=then), judge)
        assert len(fake.requests) == 2, "a whole trace is asked of nobody"
    assert asked == [[0, 0], [0, 0, 1], [0, 0, 1, 5]]
    assert judged == [0, 0, 1, 5]
    assert group.rollouts[3].tokens.tolist() == TRACE.tolist()
    assert group.rollouts[3].policy_version == group.rollouts[0].policy_version

    class Verifier:
        def verify(self, pairs: Sequence[Any], bar: Any = None) -> list[Verdict]:
            assert not pairs
            return []

    stranger: Any = Verifier()
    (graded,) = grade([group], stranger, False, show_progress=False)
    assert [one.reward for one in graded.verdicts] == [0, 0, 1, 5]


def test_a_group_with_a_rollout_that_has_no_verdict_asks_for_no_more() -> None:
    def then(verdicts: Sequence[Verdict]) -> Sequence[GroupPart]:
        raise AssertionError("the group is dropped")

    plan = GroupPlan(first=(GroupPart(count=2),), then=then)
    with FakeSGLang() as fake:
        ((group,), _) = sampled(fake, plan, lambda _: [verdict(1), verdict(0, "KeyError: 'x'")])
    assert [one.error for one in group.verdicts] == [None, "KeyError: 'x'"]


def test_a_part_that_a_server_refuses_drops_the_group_and_aborts_its_other_parts() -> None:
    plan = GroupPlan(first=(GroupPart(count=1), GroupPart(count=1, prefix=TRACE[:2])))
    size = len(make_prompts(1)[0].tokens)
    with FakeSGLang(lambda _, body: "400" if len(body["input_ids"]) > size else "hang") as fake:
        groups, stats = sampled(fake, plan)
        assert not groups
        assert [group.reason for group in stats.dropped] == [DropReason.REFUSED]
        fake.release()


def test_a_mistake_in_a_plan_is_raised() -> None:
    def then(verdicts: Sequence[Verdict]) -> Sequence[GroupPart]:
        raise ZeroDivisionError

    with FakeSGLang() as fake, pytest.raises(ZeroDivisionError):
        sampled(fake, GroupPlan(first=(GroupPart(count=1),), then=then), lambda _: [verdict(1)])


def test_servers_that_honour_seeds_get_another_one_for_each_rollout_and_the_same_ones_again() -> None:
    """With one seed for a request such a server would give the same response ``n`` times."""
    plan = GroupPlan(
        first=(GroupPart(count=2), GroupPart(count=1, prefix=TRACE[:3])),
        then=lambda verdicts: (GroupPart(count=3),) if len(verdicts) == 3 else (),
    )

    def seeds_of(run_seed: int, plan: GroupPlan | None) -> list[list[int]]:
        with FakeSGLang() as fake:
            groups, _ = collect(
                make_prompts(2),
                make_client([fake.url], run_seed=run_seed),
                group_size=4,
                planner=None if plan is None else planner(lambda _: plan, lambda group: [verdict(1.0)] * 3),
                progress=False,
            )
            assert [len(group.rollouts) for group in groups] == ([4, 4] if plan is None else [6, 6])
            asked = [body["sampling_params"] for body in fake.requests]
        assert {one.get("n") for params in asked for one in (params if isinstance(params, list) else [params])} == {1}
        return sorted([one["sampling_seed"] for one in (p if isinstance(p, list) else [p])] for p in asked)

    whole, parts = seeds_of(7, None), seeds_of(7, plan)
    assert [len(one) for one in whole] == [4, 4]
    assert sorted(len(one) for one in parts) == [1, 1, 2, 2, 3, 3]
    for found in (whole, parts):
        flat = [seed for one in found for seed in one]
        assert len(set(flat)) == len(flat)
    assert seeds_of(7, None) == whole
    assert seeds_of(8, None) != whole
