from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.objective.recipes.registry import build_objective
from megatron_dypo.objective.route import route
from megatron_dypo.types import Treatment
from tests.support.graded_groups import graded

DYPO = build_objective(ObjectiveConfig())


def test_each_tier_gets_its_treatment():
    groups = [graded(0, [True, True]), graded(1, [True, False]), graded(2, [False, False])]
    routed = route(groups, DYPO, step=0, version=4, seed=1)
    assert routed.treatments == [Treatment.DROP, Treatment.REINFORCE, Treatment.DISTILL]
    easy, mid, (trace,) = routed.samples
    assert easy == []
    assert [s.is_correct for s in mid] == [True, False]
    assert [s.reward for s in mid] == [0.9, -0.1]
    assert [s.member for s in mid] == [0, 1]
    assert mid[1].tokens.tolist() == [1, 2, 3, 5, 7]
    assert mid[1].rollout_logp.tolist() == [-1.0, -2.0]
    assert trace.tokens.tolist() == [1, 2, 3, 7, 8, 9, 2]
    assert (trace.num_prompt_tokens, trace.rollout_logp) == (3, None)
    assert routed.teachers[:2] == [None, None]
    assert routed.teachers[2] in ("a", "b")


def test_a_hard_prompt_without_a_trace_is_skipped_and_counted():
    routed = route([graded(0, [False, False], traces=())], DYPO, step=0, version=0, seed=1)
    assert (routed.samples, routed.treatments, routed.without_teacher) == ([[]], [Treatment.DROP], 1)


def test_a_group_is_as_old_as_its_oldest_rollout_and_a_trace_as_the_servers_weights():
    routed = route([graded(0, [True, False], versions=[6, 5]), graded(1, [False])], DYPO, step=7, version=7, seed=1)
    assert [s.policy_version for s in routed.samples[0]] == [5, 5]
    assert routed.samples[1][0].policy_version == 7


def test_the_teacher_drawn_depends_on_seed_prompt_and_visit_alone():
    groups = [graded(i, [False, False]) for i in range(20)]
    first = route(groups, DYPO, step=0, version=0, seed=1).teachers
    again = [route([g], DYPO, step=5, version=3, seed=1).teachers[0] for g in reversed(groups)][::-1]
    assert first == again
    assert set(first) == {"a", "b"}
    assert route(groups, DYPO, step=0, version=0, seed=2).teachers != first
