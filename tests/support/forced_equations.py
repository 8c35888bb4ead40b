"""Losses of the methods with forced tokens or a buffer of traces, as their papers and codes write them.

Conventions are those of :mod:`tests.support.rival_equations`. ``forced`` of a rollout is the number of its first tokens
that are a teacher's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from tests.support.rival_equations import (
    Equation,
    Prompts,
    Reduce,
    Response,
    add,
    advantages,
    entropy_bonus,
    over_8192,
    rollouts_of,
    surrogate,
)

ReduceGroup: TypeAlias = Callable[[Sequence[Tensor], Sequence[Response]], Tensor]


def relift(reduce: ReduceGroup, *, std: bool, clip: bool, coef: float) -> Equation:
    """Return the loss of the updates on rollouts."""

    def loss(prompts: Prompts) -> Tensor:
        terms, low = [], 0.2 if clip else None
        for p in prompts:
            scores = advantages([y.reward for y in p.rollouts], std)
            tokens = [surrogate(y, score, low, low) for y, score in zip(p.rollouts, scores, strict=True)]
            terms.append(reduce(tokens, p.rollouts))
        return add(terms) / len(prompts) + (entropy_bonus(rollouts_of(prompts), coef) if coef else 0.0)

    return loss


def relift_buffer(coef: float, is_token_mean: bool) -> Equation:
    """Return the loss of the update on traces of prompts that no rollout solved."""

    def loss(prompts: Prompts) -> Tensor:
        traces = [p.trace for p in prompts if not any(y.reward for y in p.rollouts)]
        tokens = [-y.logp - coef * y.entropy for y in traces]
        return torch.cat(tokens).mean() if is_token_mean else add(one.mean() for one in tokens) / len(traces)

    return loss


def prefix_rft(continuation: bool, coef: float, dual: float | None) -> Equation:
    """Return the loss: k−1 rollouts, and one's 20% most uncertain prefix tokens, and if asked its continuation."""

    def loss(prompts: Prompts) -> Tensor:
        terms = []
        for p in prompts:
            *own, behind = p.rollouts
            mean = sum(y.reward for y in own) / len(own)
            terms += [over_8192(surrogate(y, y.reward - mean, dual=dual), y) / len(p.rollouts) for y in own]
            ascending = behind.entropy[: behind.forced].argsort(stable=True)
            learned = ascending[int(0.8 * behind.forced) :]
            on_prefix = surrogate(behind, behind.reward - mean, dual=dual)[learned].sum()
            after = surrogate(behind, behind.reward, dual=dual)[behind.forced :].sum()
            terms.append((on_prefix + (after if continuation else 0.0)) / 8192 / len(p.rollouts))
        return add(terms) / len(prompts) + entropy_bonus(rollouts_of(prompts), coef)

    return loss


def trapo(reduce: Reduce, *, std: bool, clip: bool, coef: float) -> Equation:
    """Return the loss: GRPO on sampled tokens, and p/max(p, 0.1) of −log π on a teacher's tokens, in every rollout."""

    def loss(prompts: Prompts) -> Tensor:
        terms = []
        for p in prompts:
            scores, low = advantages([y.reward for y in p.rollouts], std), 0.2 if clip else None
            for y, score in zip(p.rollouts, scores, strict=True):
                probability = y.logp.exp()
                learned = probability / probability.detach().clamp(min=0.1)
                tokens = torch.cat([-learned[: y.forced], surrogate(y, score, low, low)[y.forced :]])
                terms.append(reduce(tokens, y) / len(p.rollouts))
        bonus = entropy_bonus(rollouts_of(prompts), coef) if coef else 0.0
        return add(terms) / len(prompts) + bonus

    return loss
