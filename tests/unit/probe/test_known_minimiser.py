"""The bias of teachers on a task whose right answer is known: a small policy over sequences, scored by autograd.

The prompt is one of six tokens, the response three tokens, and the policy a table of logits by position and last token.
The right answer to a prompt is a distribution q* over four traces in eighths. It minimises the SFT loss, so the target
is g* = −E_q*[∇ log π(τ)] at the present weights. A teacher's error is the gradient on its own trace minus g*: with one
trace drawn from q*, its mean is 0 and its mean square is E_q*|∇ log π(τ)|² − |g*|².
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dypo.probe.gradients import Setting, sft_gradients
from megatron_dypo.probe.result import analyse
from megatron_dypo.probe.scores import Floats, Integers, Scores
from megatron_dypo.probe.teachers import estimate_teachers, teacher_errors

KINDS, TRACES, LENGTH, VOCAB, EIGHTHS = 6, 4, 3, 6, 8
SETTING = Setting(group_size=4, length_normalization="sum", reference="old")
PROMPTS, TRIALS = 100, 50
MANY = 1000
"""Prompts with which the interval of a share or a correlation of 0 is within ±0.1."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """Suffixes: K kinds of prompts, X traces of a prompt, T positions, V tokens, d parameters of the policy."""

    logits_TVV: torch.Tensor
    tokens_KXT: Integers
    right_KX: Integers
    """Eighths of q*."""
    wrong_KX: Integers
    """Eighths of the distribution that teachers with a common bias draw from."""
    score_KXd: Floats
    """∇ log π(τ), by autograd."""

    def moments(self, eighths_KX: Integers) -> tuple[float, float]:
        """Return b² and σ² of teachers that draw from this distribution, as means over all kinds of prompts."""
        share_KX = eighths_KX / EIGHTHS
        mean_Kd = np.einsum("kx,kxd->kd", share_KX, self.score_KXd)
        right_Kd = np.einsum("kx,kxd->kd", self.right_KX / EIGHTHS, self.score_KXd)
        square_K = np.einsum("kx,kxd,kxd->k", share_KX, self.score_KXd, self.score_KXd)
        bias = ((mean_Kd - right_Kd) ** 2).sum(axis=1).mean()
        return float(bias), float((square_K - (mean_Kd**2).sum(axis=1)).mean())


@functools.cache
def task() -> Task:
    rng = np.random.default_rng(0)
    logits_TVV = torch.from_numpy(rng.standard_normal((LENGTH, VOCAB, VOCAB))).requires_grad_()
    tokens_KXT = np.stack(
        [
            np.stack(np.unravel_index(rng.choice(VOCAB**LENGTH, TRACES, replace=False), (VOCAB,) * LENGTH), axis=1)
            for _ in range(KINDS)
        ]
    )
    scores = []
    for kind, traces in enumerate(tokens_KXT):
        for trace in traces:
            before = [kind, *trace[:-1]]
            logp_TV = logits_TVV[range(LENGTH), before].log_softmax(dim=1)
            (score,) = torch.autograd.grad(logp_TV[range(LENGTH), list(trace)].sum(), logits_TVV)
            scores.append(score.numpy().ravel())
    right_KX = rng.permuted(np.tile([1, 1, 2, 4], (KINDS, 1)), axis=1)
    return Task(
        logits_TVV=logits_TVV.detach(),
        tokens_KXT=tokens_KXT,
        right_KX=right_KX,
        wrong_KX=np.roll(right_KX, 1, axis=1),
        score_KXd=np.array(scores).reshape(KINDS, TRACES, -1),
    )


def draw(seed: int, *, teachers: int, prompts: int = PROMPTS, biased: bool = False, copied: Any = ()) -> Scores:
    """Draw prompts and a trace of each teacher; the teacher ``target`` has every right trace, as often as q* says.

    Args:
        copied: chance with which each teacher gives the trace of the teacher before it; (): never.
    """
    rng, one = np.random.default_rng(seed), task()
    kind_P = rng.integers(KINDS, size=prompts)
    share_KX = (one.wrong_KX if biased else one.right_KX) / EIGHTHS
    chosen_PM = np.array([rng.choice(TRACES, teachers, p=share_KX[kind]) for kind in kind_P])
    for teacher, chance in enumerate(copied, start=1):
        copies_P = rng.random(prompts) < chance
        chosen_PM[copies_P, teacher] = chosen_PM[copies_P, teacher - 1]
    target_PE = np.array([np.repeat(np.arange(TRACES), one.right_KX[kind]) for kind in kind_P])
    trace_PN = np.concatenate([target_PE, chosen_PM], axis=1)
    teacher_PN = np.tile(np.concatenate([np.zeros(EIGHTHS), np.arange(1, teachers + 1)]), (prompts, 1))
    return _to_scores(kind_P, trace_PN, teacher_PN.astype(np.int64), teachers)


def _to_scores(kind_P: Integers, trace_PN: Integers, teacher_PN: Integers, teachers: int) -> Scores:
    count = trace_PN.size
    return Scores(
        score_Nd=task().score_KXd[kind_P[:, None], trace_PN].reshape(count, -1).astype(np.float32),
        prompt_N=np.repeat(np.arange(len(kind_P)), trace_PN.shape[1]),
        repeat_N=np.full(count, -1),
        teacher_N=teacher_PN.ravel(),
        is_correct_N=np.ones(count, dtype=bool),
        reward_N=np.ones(count),
        length_N=np.full(count, LENGTH),
        log_ratio_N={"old": np.zeros(count)},
        prompt_ids=tuple(f"prompt-{index}" for index in range(len(kind_P))),
        teachers=("target", *(f"teacher-{index}" for index in range(1, teachers + 1))),
        step=0,
    )


def estimates(scores: Scores) -> Any:
    return estimate_teachers(teacher_errors(scores, SETTING, "target"))


def covered(found: list[Any], name: str, truth: float) -> float:
    return float(np.mean([one[name].low <= truth <= one[name].high for one in found]))


def verdicts(scores: Scores, target: str | None = "target") -> dict[str, str]:
    return {one["name"]: one["verdict"] for one in analyse(scores, SETTING, 0.5, target=target)["assumptions"]}


def test_the_target_is_the_gradient_at_the_known_minimiser():
    one, scores = task(), draw(0, teachers=2, prompts=20)
    policy_TVV = one.logits_TVV.softmax(dim=2).numpy()
    gradient_PMd, _ = sft_gradients(scores, SETTING)
    kind_P = np.random.default_rng(0).integers(KINDS, size=20)
    for kind, found in zip(kind_P, gradient_PMd[:, 0], strict=True):
        expected = np.zeros_like(policy_TVV)
        for trace, eighths in zip(one.tokens_KXT[kind], one.right_KX[kind], strict=True):
            for t, (last, token) in enumerate(zip([kind, *trace[:-1]], trace, strict=True)):
                expected[t, last] += eighths / EIGHTHS * (policy_TVV[t, last] - np.eye(VOCAB)[token])
        np.testing.assert_allclose(found, expected.ravel(), atol=1e-6)


@pytest.mark.parametrize("teachers", [2, 4])
def test_intervals_of_independent_teachers_contain_no_bias_and_the_known_slope(teachers):
    found = [estimates(draw(seed, teachers=teachers)) for seed in range(TRIALS)]
    slope = task().moments(task().right_KX)[1]
    assert covered(found, "offset", 0.0) >= 0.9
    assert covered(found, "common_share", 0.0) >= 0.9
    assert covered(found, "slope", slope) >= 0.9
    assert covered(found, "slope", 1.5 * slope) < 0.1  # the intervals are narrow enough to miss another slope
    assert covered(found, "slope", slope / 1.5) < 0.1
    last = [one["curve"][-1] for one in found]
    assert covered(last, "nested", slope / teachers) >= 0.9


@pytest.mark.parametrize("teachers", [2, 4])
def test_a_bias_that_teachers_share_is_measured(teachers):
    found = [estimates(draw(seed, teachers=teachers, biased=True)) for seed in range(TRIALS)]
    offset, slope = task().moments(task().wrong_KX)
    assert covered(found, "offset", offset) >= 0.9
    assert covered(found, "slope", slope) >= 0.9
    assert covered(found, "common_share", offset / (offset + slope)) >= 0.9
    assert covered(found, "offset", 0.0) <= 0.1


@pytest.mark.parametrize("teachers", [2, 4])
def test_teachers_that_copy_each_other_do_not_divide_the_error(teachers):
    copied = [0.5] * (teachers - 1)
    found = [estimates(draw(seed, teachers=teachers, copied=copied)) for seed in range(TRIALS)]
    slope = task().moments(task().right_KX)[1]
    # the chance that i and j have the same draw is ½ to the power of their distance
    pairs = [0.5 ** (j - i) for j in range(teachers) for i in range(j)]
    assert covered(found, "common_share", float(np.mean(pairs))) >= 0.9
    assert covered(found, "offset", float(np.mean(pairs)) * slope) >= 0.9
    assert covered(found, "common_share", 0.0) <= 0.1
    assert covered([one["curve"][-1] for one in found], "nested", slope / teachers) <= 0.1


@pytest.mark.parametrize(
    ("copied", "least", "most"), [((), 0.0, 0.15), ((0.5, 0.0, 0.5), 0.95, 1.0)], ids=["independent", "two families"]
)
def test_products_of_pairs_differ_where_only_some_teachers_copy(copied, least, most):
    p = [estimates(draw(seed, teachers=4, copied=copied))["equal_products"]["p"] for seed in range(TRIALS)]
    assert least <= np.mean(np.array(p) < 0.05) <= most


@pytest.mark.parametrize("teachers", [2, 4])
def test_verdicts_on_teachers_are_right_in_both_directions(teachers):
    copied = [0.5] * (teachers - 1)
    assert verdicts(draw(0, teachers=teachers, prompts=MANY))["teachers_slope"] == "holds"
    assert verdicts(draw(0, teachers=teachers, biased=True))["teachers_slope"] == "does not hold"
    assert verdicts(draw(0, teachers=teachers, copied=copied))["teachers_slope"] == "does not hold"
    without = draw(0, teachers=teachers, prompts=MANY, copied=copied)
    assert verdicts(without, target=None)["teachers_slope"] == "cannot be told"


@pytest.mark.parametrize("chance", [0.5, 0.9, 1.0])
def test_families_that_copy_fail_the_verdict_of_independence(chance):
    assert verdicts(draw(0, teachers=4, prompts=MANY))["teachers_independent"] == "holds"
    assert verdicts(draw(0, teachers=4, copied=(chance, 0.0, chance)))["teachers_independent"] == "does not hold"
