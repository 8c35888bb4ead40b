"""Losses of published methods as their papers and codes write them, one prompt after the other, in float64.

:mod:`tests.support.rival_presets` says which loss a preset promises. If a publication shapes a gradient by the
derivative of its loss, so does this file: the trainer's shapes are checked against autograd. ``p`` is a prompt:
``p.rollouts`` and ``p.trace`` have ``logp``, ``entropy``, ``old`` ([R] tensors, the first two with gradient) and
``reward``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Response: TypeAlias = Any
"""A namespace of ``logp``, ``entropy``, ``old`` and ``reward``."""
Prompts: TypeAlias = Sequence[Any]
Reduce: TypeAlias = Callable[[Tensor, Any], Tensor]
Equation: TypeAlias = Callable[[Prompts], Tensor]


def add(terms: Iterable[Tensor]) -> Tensor:
    """Return the sum; 0 for no terms."""
    return sum(terms, start=torch.zeros((), dtype=torch.float64))


def advantages(rewards: Sequence[float], std: bool) -> list[float]:
    mean = sum(rewards) / len(rewards)
    centred = [reward - mean for reward in rewards]
    if not std or all(value == 0 for value in centred):
        return centred
    deviation = math.sqrt(sum(value**2 for value in centred) / (len(centred) - 1))
    return [value / (deviation + 1e-6) for value in centred]


def surrogate(
    y: Response, advantage: float, low: float | None = 0.2, high: float | None = 0.2, dual: float | None = None
) -> Tensor:
    """Return [R] −C(ρ, Â); ``low=None``: no clip."""
    ratio = (y.logp - y.old).exp()
    if low is None or high is None:
        return -ratio * advantage
    value = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    if dual is not None and advantage < 0:
        value = torch.maximum(value, torch.full_like(value, dual * advantage))
    return -value


def length(y: Response) -> int:
    return len(y.logp)


def own_mean(tokens: Tensor, _: Response) -> Tensor:
    return tokens.sum() / len(tokens)


def total(tokens: Tensor, _: Response) -> Tensor:
    return tokens.sum()


def over_8192(tokens: Tensor, _: Response) -> Tensor:
    return tokens.sum() / 8192


def grpo(
    rollouts: Sequence[Response],
    reduce: Reduce,
    *,
    std: bool = True,
    low: float | None = 0.2,
    high: float | None = 0.2,
    dual: float | None = None,
) -> Tensor:
    """Return one prompt's (1/k) Σ_i reduce(−C)."""
    scores = advantages([y.reward for y in rollouts], std)
    terms = [reduce(surrogate(y, a, low, high, dual), y) for y, a in zip(rollouts, scores, strict=True)]
    return add(terms) / len(rollouts)


def entropy_bonus(sequences: Sequence[Response], coef: float) -> Tensor:
    """Return −coef times the mean entropy of all tokens."""
    entropies = torch.cat([y.entropy for y in sequences])
    return -coef * entropies.mean()


def token_mean_nll(traces: Sequence[Response], factor: Callable[[Response], Any] = lambda y: 1.0) -> Tensor:
    return add((-factor(y) * y.logp).sum() for y in traces) / max(sum(map(length, traces)), 1)


def rollouts_of(prompts: Prompts, count: int | None = None) -> list[Response]:
    return [y for p in prompts for y in p.rollouts[:count]]


def traces_of(prompts: Prompts) -> list[Response]:
    return [p.trace for p in prompts]


def sft(prompts: Prompts) -> Tensor:
    mean = sum(map(length, traces_of(prompts))) / len(prompts)
    return add(-p.trace.logp.sum() / mean for p in prompts) / len(prompts)


def dr_grpo(coef: float) -> Equation:
    def loss(prompts: Prompts) -> Tensor:
        terms = [grpo(p.rollouts, over_8192, std=False) for p in prompts]
        return add(terms) / len(prompts) + entropy_bonus(rollouts_of(prompts), coef)

    return loss


def sft_then_rl(prompts: Prompts) -> Tensor:
    """Return the loss of the first phase: supervised, with the normaliser and the entropy bonus of the second phase."""
    terms = [-p.trace.logp.sum() / 8192 for p in prompts]
    return add(terms) / len(prompts) + entropy_bonus(traces_of(prompts), 0.01)


def token_mean_grpo(prompts: Prompts, **clip: float | None) -> Tensor:
    parts = []
    for p in prompts:
        scores = advantages([y.reward for y in p.rollouts], True)
        parts += [surrogate(y, a, **clip) for y, a in zip(p.rollouts, scores, strict=True)]
    return torch.cat(parts).mean()


def fixed_chord(prompts: Prompts) -> Tensor:
    return 0.9 * token_mean_grpo(prompts) + 0.1 * token_mean_nll(traces_of(prompts))


def rl_with_sft_loss(prompts: Prompts) -> Tensor:
    """Return the loss up to the scale 1/1.1: a sum over 64 sequences of the policy and 6.4 supervised ones, over 64."""
    rl = add(grpo(p.rollouts[:-1], over_8192, std=False, low=None) for p in prompts) / len(prompts)
    loss = (rl + 0.1 * token_mean_nll(traces_of(prompts))) / 1.1
    return loss + entropy_bonus([*rollouts_of(prompts, -1), *traces_of(prompts)], 0.001)


def superrl(is_supervised: Callable[[list[float]], bool]) -> Equation:
    def loss(prompts: Prompts) -> Tensor:
        terms = []
        for p in prompts:
            if is_supervised([y.reward for y in p.rollouts]):
                terms.append(own_mean(-p.trace.logp, p.trace))
            else:
                terms.append(grpo(p.rollouts, own_mean))
        return add(terms) / len(prompts)

    return loss


def luffy(
    prompts: Prompts,
    reduce: Callable[[list[Tensor], list[Response]], Tensor],
    *,
    std: bool,
    clip: bool,
    coef: float,
    gamma: float = 0.1,
) -> Tensor:
    terms = []
    for p in prompts:
        members = [*p.rollouts[:-1], p.trace]
        scores = advantages([y.reward for y in members], std)
        clips = 0.2 if clip else None
        tokens = [surrogate(y, a, clips, clips) for y, a in zip(members[:-1], scores[:-1], strict=True)]
        probability = p.trace.logp.exp()
        tokens.append(-scores[-1] * probability / (probability + gamma))
        terms.append(reduce(tokens, members))
    loss = add(terms) / len(prompts)
    return loss + (entropy_bonus([*rollouts_of(prompts, -1), *traces_of(prompts)], coef) if coef else 0.0)


def member_mean_over_8192(tokens: Sequence[Tensor], members: Sequence[Response]) -> Tensor:
    return add(token.sum() for token in tokens) / (8192 * len(members))


def group_token_mean(tokens: Sequence[Tensor], _: Sequence[Response]) -> Tensor:
    return torch.cat(list(tokens)).mean()


def mean_entropy(y: Response) -> Tensor:
    mean: Tensor = y.entropy.detach().mean()
    return mean


def srft_self(rollouts: Sequence[Response], count: int, reduce: Reduce) -> Tensor:
    right = add(0.1 * mean_entropy(y).exp() * reduce(-y.logp, y) for y in rollouts if y.reward > 0)
    wrong = add(reduce(y.logp, y) for y in rollouts if y.reward <= 0)
    return (right + wrong) / count


def srft_paper(prompts: Prompts) -> Tensor:
    terms = []
    for p in prompts:
        star = advantages([y.reward for y in (*p.rollouts, p.trace)], True)[-1]
        supervised = 0.5 * (-mean_entropy(p.trace)).exp() * -p.trace.logp.sum()
        policy = -(p.trace.logp.exp() * star).sum()
        terms.append(supervised + policy + srft_self(p.rollouts, len(p.rollouts), total))
    return add(terms) / len(prompts)


def srft_hpt_code(prompts: Prompts) -> Tensor:
    terms = []
    for p in prompts:
        members = [*p.rollouts[:-1], p.trace]
        star = advantages([y.reward for y in members], False)[-1]
        probability = p.trace.logp.exp()
        policy = over_8192(-star * probability / (probability + 0.1), p.trace) / len(members)
        terms.append(policy + srft_self(p.rollouts[:-1], len(members), over_8192))
    supervised = token_mean_nll(traces_of(prompts), lambda y: 0.5 * (-mean_entropy(y)).exp())
    return add(terms) / len(prompts) + 0.1 * supervised


def chord(mu: float, phi: bool, **clip: float | None) -> Equation:
    def weight(y: Response) -> Any:
        probability = y.logp.detach().exp()
        return probability * (1 - probability) if phi else 1.0

    def loss(prompts: Prompts) -> Tensor:
        return (1 - mu) * token_mean_grpo(prompts, **clip) + mu * token_mean_nll(traces_of(prompts), weight)

    return loss


def hpt(
    gate: float,
    reduce: Reduce = total,
    *,
    std: bool = True,
    clip: bool = True,
    sft_scale: float | None = None,
    coef: float = 0.0,
) -> Equation:
    """Return the loss; ``sft_scale`` None: mean over prompts of each trace's mean; else it times all traces' mean."""

    def loss(prompts: Prompts) -> Tensor:
        low = 0.2 if clip else None
        rl, supervised = list[Any](), list[Any]()
        for p in prompts:
            few = sum(y.reward > 0 for y in p.rollouts) <= gate * len(p.rollouts)
            (supervised if few else rl).append(p)
        value = add(grpo(p.rollouts, reduce, std=std, low=low) for p in rl) / len(prompts)
        if sft_scale is None:
            value = value + add(own_mean(-p.trace.logp, p.trace) for p in supervised) / len(prompts)
        else:
            value = value + sft_scale * token_mean_nll(traces_of(supervised))
        return value + (entropy_bonus([*rollouts_of(rl), *traces_of(supervised)], coef) if coef else 0.0)

    return loss
