"""On-policy distillation against its equations in float64, and against a worked example of two prompts."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from megatron_dypo.batching.pack import pack
from megatron_dypo.config.distillation.opd import OpdConfig
from megatron_dypo.config.objective import ImportanceConfig, ObjectiveConfig
from megatron_dypo.objective.recipes.registry import build_objective
from megatron_dypo.objective.route import route
from megatron_dypo.objective.streams import STREAMS
from megatron_dypo.types import Sample, SampleKind, Treatment
from tests.support.graded_groups import graded
from tests.support.objective_cases import loss_inputs, totals_of
from tests.support.present import present

Logps = npt.NDArray[Any]
"""[R] float64."""

EXAMPLE: dict[str, Any] = {
    "rewards": [[1, 0, 0, 1], [0, 0, 0, 0]],
    "logp": [
        [[-0.2, -1.1, -0.5], [-0.9, -0.3, -2.0], [-0.4, -0.7, -0.15], [-1.5, -0.25, -0.6]],
        [[-0.8, -0.35, -1.2], [-0.55, -2.4, -0.1], [-1.0, -0.45, -0.65], [-0.3, -1.75, -0.95]],
    ],
    "old_logp": [
        [[-0.45, -1.1, -0.5], [-0.6, -0.3, -2.0], [-0.4, -0.95, -0.15], [-1.5, -0.2, -0.85]],
        [[-0.8, -0.4, -1.2], [-0.55, -2.4, -0.15], [-1.05, -0.45, -0.65], [-0.3, -1.75, -0.9]],
    ],
    "teacher_logp": [
        [[-0.3, -0.6, -0.4], [-1.9, -0.2, -3.1], [-0.5, -1.6, -0.1], [-0.7, -0.25, -0.5]],
        [[-1.7, -0.3, -2.2], [-0.5, -3.0, -0.2], [-2.0, -0.4, -0.9], [-0.6, -2.6, -0.8]],
    ],
}
"""A Mid and a Hard prompt, each with four rollouts of three tokens."""
CLIPPED_LOSS = 0.2246580824336119
CLIPPED = [
    [0.0, -0.0569176626577932, -0.040250995991126526], [0.0, 0.031917662657793194, 0.0819176626577932],
    [0.040250995991126526, 0.08110888436536359, 0.03400099599112653], [-0.0694176626577932, -0.03234274784909037, 0.0],
    [0.03749999999999999, -0.004380296234900102, 0.04166666666666667],
    [-0.002083333333333335, 0.025, 0.002190148117450051],
    [0.04161281423155095, -0.002083333333333333, 0.010416666666666666],
    [0.012499999999999999, 0.035416666666666666, -0.0039634559354196405],
]  # fmt: skip
REINFORCE_LOSS = -0.335512798797338
REINFORCE = [
    [-0.031917662657793194, -0.0569176626577932, -0.040250995991126526],
    [0.07775099599112652, 0.031917662657793194, 0.0819176626577932],
    [0.040250995991126526, 0.07358432932445987, 0.03400099599112653],
    [-0.0694176626577932, -0.03608432932445986, -0.040250995991126526],
    [0.03749999999999999, -0.002083333333333333, 0.04166666666666667],
    [-0.002083333333333335, 0.025, 0.004166666666666667],
    [0.041666666666666664, -0.002083333333333333, 0.010416666666666666],
    [0.012499999999999999, 0.035416666666666666, -0.006249999999999996],
]  # fmt: skip


def rollout(order: int, member: int, reward: float, old_logp: Any, teacher_logp: Any) -> Sample:
    logps: dict[str, Any] = {
        "old_logp": old_logp,
        "rollout_logp": old_logp,
        "ref_logp": old_logp,
        "teacher_logp": teacher_logp,
    }
    return Sample(
        order=order,
        member=member,
        treatment=Treatment.REINFORCE,
        kind=SampleKind.ROLLOUT,
        tokens=np.arange(2 + len(old_logp), dtype=np.int32),
        num_prompt_tokens=2,
        policy_version=0,
        is_correct=reward > 0.5,
        reward=float(reward),
        **{name: np.asarray(values, np.float64) for name, values in logps.items()},
    )


def example_groups() -> list[list[Any]]:
    old, teacher = EXAMPLE["old_logp"], EXAMPLE["teacher_logp"]
    return [
        [rollout(order, i, reward, old[order][i], teacher[order][i]) for i, reward in enumerate(rewards)]
        for order, rewards in enumerate(EXAMPLE["rewards"])
    ]


def ragged_groups(seed: int = 0) -> tuple[list[list[Any]], list[Logps]]:
    """Make three groups of rollouts of unequal lengths; the servers' and the trainer's log-probs differ."""
    rng = np.random.default_rng(seed)
    groups = []
    for order, size in enumerate((4, 3, 5)):
        group = []
        for member in range(size):
            length = int(rng.integers(1, 8))
            old, teacher = rng.normal(-2, 0.7, (2, length))
            sample = rollout(order, member, rng.normal(), old, teacher)
            sample.rollout_logp = old + rng.normal(0, 0.3, length)
            group.append(sample)
        groups.append(group)
    logps = [s.old_logp + rng.normal(0, 0.3, s.num_response_tokens) for group in groups for s in group]
    return groups, logps


def loss_and_gradients(
    groups: Sequence[Sequence[Any]], logps: Sequence[Logps], cfg: ObjectiveConfig
) -> tuple[float, list[Logps], dict[str, float], dict[str, float]]:
    """Return loss, gradient of each sample and named sums in float64, through packed streams."""
    objective, totals = build_objective(cfg), totals_of(groups)
    weighted, group_sums = list[Sample](), dict[str, float]()
    for group in groups:
        result = objective.token_weights(group, totals, 0)
        weighted += [dataclasses.replace(s, weights=w) for s, w in zip(group, result.weights, strict=True)]
        for name, value in result.sums.items():
            group_sums[name] = group_sums.get(name, 0.0) + value
    streams = tuple(dataclasses.replace(s, dtype=np.float64) if s.dtype == np.float32 else s for s in objective.streams)
    microbatch = pack(weighted, range(len(weighted)), sum(len(s.tokens) for s in weighted), streams=streams)
    at = np.flatnonzero(microbatch.response_T)
    x = loss_inputs(len(at), sequence=microbatch.sequence_T[at], **{n: v[at] for n, v in microbatch.streams.items()})
    logp_N = torch.tensor(np.concatenate(logps), requires_grad=True)
    loss, sums = objective.loss(logp_N, torch.zeros_like(logp_N), x)
    loss.backward()
    gradients = np.split(present(logp_N.grad).numpy(), np.cumsum([len(logp) for logp in logps])[:-1])
    return loss.item(), gradients, {name: float(value) for name, value in sums.items()}, group_sums


@pytest.mark.parametrize(
    ("estimator", "loss", "gradients"),
    [("clipped", CLIPPED_LOSS, CLIPPED), ("reinforce", REINFORCE_LOSS, REINFORCE)],
)
def test_loss_and_gradient_of_the_worked_example(estimator: Any, loss: float, gradients: list[list[float]]) -> None:
    cfg = ObjectiveConfig(name="opd", opd=OpdConfig(estimator=estimator))
    logps = [np.array(logp) for group in EXAMPLE["logp"] for logp in group]
    found_loss, found, sums, _ = loss_and_gradients(example_groups(), logps, cfg)
    np.testing.assert_allclose(np.array(found), gradients, atol=1e-6)
    assert found_loss == pytest.approx(loss, abs=1e-6)
    assert sums["objective"] == pytest.approx(loss, abs=1e-6)


def literal_loss(
    groups: Sequence[Sequence[Any]], logp_of: Mapping[tuple[int, int], torch.Tensor], cfg: Any
) -> torch.Tensor:
    """Compute the equations as written: one loop over groups, members and tokens."""
    total, opd, n = torch.zeros((), dtype=torch.float64), cfg.opd, len(groups)
    for group in groups:
        rewards = torch.tensor([s.reward for s in group], dtype=torch.float64)
        advantages = (rewards - rewards.mean()) / (rewards.std() + cfg.advantage_epsilon)
        for sample, advantage in zip(group, advantages, strict=True):
            logp_R = logp_of[sample.order, sample.member]
            of_sample = torch.zeros((), dtype=torch.float64)
            for t in range(len(logp_R)):
                old, teacher = float(sample.old_logp[t]), float(sample.teacher_logp[t])
                u = np.exp(old - float(sample.rollout_logp[t]))
                low, high = cfg.importance.token_bounds or (0.0, np.inf)
                if not low <= u <= high:
                    continue
                u = min(u, cfg.importance.cap) if cfg.importance.cap else 1.0
                if opd.estimator == "clipped":
                    a = opd.reward_coef * advantage - opd.kl_coef * (old - teacher)
                    ratio = torch.exp(logp_R[t] - old)
                    clipped = torch.clamp(ratio, 1 - cfg.clip_low, 1 + cfg.clip_high)
                    of_sample = of_sample - u * torch.minimum(ratio * a, clipped * a)
                else:
                    a = opd.reward_coef * advantage - opd.kl_coef * (logp_R[t].detach() - teacher)
                    of_sample = of_sample - u * a * logp_R[t]
            total = total + of_sample / (n * len(group) * sample.num_response_tokens)
    return total


@pytest.mark.parametrize("estimator", ["clipped", "reinforce"])
@pytest.mark.parametrize(
    "options",
    [{"kl_coef": 1.0}, {"kl_coef": 0.3, "reward_coef": 0.7}, {"kl_coef": 2.0, "reward_coef": 0.0}],
)
@pytest.mark.parametrize("correction", [ImportanceConfig(), ImportanceConfig(cap=1.1, token_bounds=(0.8, 1.3))])
def test_gradients_are_those_of_the_equations(
    estimator: Any, options: dict[str, float], correction: ImportanceConfig
) -> None:
    cfg = ObjectiveConfig(name="opd", opd=OpdConfig(estimator=estimator, **options), importance=correction)
    groups, logps = ragged_groups()
    members = [sample for group in groups for sample in group]
    leaves = [torch.tensor(logp, requires_grad=True) for logp in logps]
    by_member = {(s.order, s.member): leaf for s, leaf in zip(members, leaves, strict=True)}
    expected = literal_loss(groups, by_member, cfg)
    expected.backward()
    loss, gradients, _, _ = loss_and_gradients(groups, logps, cfg)
    assert loss == pytest.approx(expected.item(), abs=1e-9)
    for found, leaf in zip(gradients, leaves, strict=True):
        np.testing.assert_allclose(found, present(leaf.grad).numpy(), atol=1e-9)


def test_without_kl_clipped_distillation_is_grpo() -> None:
    groups, logps = ragged_groups(1)
    loss, gradients, _, _ = loss_and_gradients(
        groups, logps, ObjectiveConfig(name="opd", opd=OpdConfig(kl_coef=0.0), kl_coef=0.1)
    )
    grpo_loss, grpo, _, _ = loss_and_gradients(groups, logps, ObjectiveConfig(name="grpo", kl_coef=0.1))
    assert loss == grpo_loss
    for ours, theirs in zip(gradients, grpo, strict=True):
        assert np.array_equal(ours, theirs)


def test_the_reverse_kl_is_the_mean_over_tokens_of_log_old_less_log_teacher() -> None:
    groups, logps = ragged_groups(2)
    *_, sums = loss_and_gradients(groups, logps, ObjectiveConfig(name="opd"))
    gaps = np.concatenate([s.old_logp - s.teacher_logp for group in groups for s in group])
    assert sums["opd_reverse_kl"] / sums["opd_tokens"] == pytest.approx(gaps.mean(), abs=1e-12)


def test_dypo_gives_hard_rollouts_without_a_trace_what_opd_gives_them_times_gamma() -> None:
    groups, logps = ragged_groups(3)
    for group in groups:
        for sample in group:
            sample.is_correct = False
    cfg = ObjectiveConfig(name="dypo", hard_without_trace="opd", gamma=0.25)
    loss, gradients, _, _ = loss_and_gradients(groups, logps, cfg)
    opd_loss, of_opd, _, _ = loss_and_gradients(groups, logps, ObjectiveConfig(name="opd"))
    assert loss == pytest.approx(0.25 * opd_loss, abs=1e-12)
    for ours, theirs in zip(gradients, of_opd, strict=True):
        np.testing.assert_allclose(ours, 0.25 * theirs, atol=1e-12)


def test_dypo_routes_hard_prompts_without_a_trace_as_hard_without_trace_says() -> None:
    hard, taught = graded(0, [False, False], traces=()), graded(1, [False, False])
    for choice, treatment in (("drop", Treatment.DROP), ("opd", Treatment.REINFORCE)):
        objective = build_objective(ObjectiveConfig(name="dypo", hard_without_trace=choice))
        routed = route([hard, taught], objective, step=0, version=0, seed=0)
        assert routed.treatments == [treatment, Treatment.DISTILL]


def test_dypo_reads_the_teacher_of_groups_without_a_success_alone() -> None:
    objective = build_objective(ObjectiveConfig(name="dypo", hard_without_trace="opd"))
    mid, hard = example_groups()
    trace = [dataclasses.replace(hard[0], treatment=Treatment.DISTILL, kind=SampleKind.TRACE)]
    assert [objective.reads_teacher(group) for group in (mid, hard, trace)] == [False, True, False]
    assert not build_objective(ObjectiveConfig(name="dypo")).needs_teacher_logp()
    assert build_objective(ObjectiveConfig(name="dypo")).streams == STREAMS


@pytest.mark.parametrize(
    "options",
    [
        {"name": "opd", "ratio": "sequence"},
        {"name": "dypo", "hard_without_trace": "opd", "rl_only_steps": 3},
        {"name": "dypo", "hard_without_trace": "opd", "ratio": "sequence"},
    ],
)
def test_options_that_contradict_distillation_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"objective\.(ratio|rl_only_steps)="):
        build_objective(ObjectiveConfig(**options))
