"""The losses of published methods as their papers and codes write them, one prompt after the other, in float64.

Each row of :data:`EQUATIONS` is what a preset promises: numbers stand here as they are published, not as the config has
them. Where a publication shapes a gradient by the derivative of its loss, so does this: the trainer's shapes are
checked against autograd. ``p`` is a prompt: ``p.rollouts`` and ``p.trace`` have ``logp``, ``entropy``, ``old`` ([R]
tensors, the first two with gradient) and ``reward``.
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
    """Their sum, 0 for none."""
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
    """[R] −C(ρ, Â); ``low`` None: no clip."""
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
    """One prompt's (1/k) Σ_i reduce(−C)."""
    scores = advantages([y.reward for y in rollouts], std)
    terms = [reduce(surrogate(y, a, low, high, dual), y) for y, a in zip(rollouts, scores, strict=True)]
    return add(terms) / len(rollouts)


def entropy_bonus(sequences: Sequence[Response], coef: float) -> Tensor:
    """−coef times the mean entropy of all tokens."""
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
    """The first phase: supervised, normalised and with the entropy bonus as the second."""
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
    """Up to the scale 1/1.1: a sum over sequences with 64 of the policy and 6.4 of the supervised term, over 64."""
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


def member_mean_over_8192(tokens: list[Tensor], members: list[Response]) -> Tensor:
    return add(token.sum() for token in tokens) / (8192 * len(members))


def group_token_mean(tokens: list[Tensor], _: list[Response]) -> Tensor:
    return torch.cat(tokens).mean()


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
    """``sft_scale`` None: the mean over prompts of each trace's mean; else that times one token mean of all traces."""

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


def prefix_rft(continuation: bool, coef: float, dual: float | None) -> Equation:
    """k−1 rollouts, and one behind a prefix: its 20% most uncertain tokens, and what follows if ``continuation``."""

    def loss(prompts: Prompts) -> Tensor:
        terms = []
        for p in prompts:
            *own, behind = p.rollouts
            mean = sum(y.reward for y in own) / len(own)
            terms += [over_8192(surrogate(y, y.reward - mean, dual=dual), y) / len(p.rollouts) for y in own]
            ascending = sorted(range(behind.forced), key=lambda t, y=behind: float(y.entropy[t].detach()))
            learned = ascending[int(0.8 * behind.forced) :]
            on_prefix = surrogate(behind, behind.reward - mean, dual=dual)[learned].sum()
            after = surrogate(behind, behind.reward, dual=dual)[behind.forced :].sum()
            terms.append((on_prefix + (after if continuation else 0.0)) / 8192 / len(p.rollouts))
        return add(terms) / len(prompts) + entropy_bonus(rollouts_of(prompts), coef)

    return loss


def trapo(reduce: Reduce, *, std: bool, clip: bool, coef: float) -> Equation:
    """GRPO on what is sampled, and p/max(p, 0.1) of −log π on what is a teacher's, of every rollout."""

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


EQUATIONS: dict[str, Equation] = {
    "sft_luffy_paper": sft,
    "dr_grpo_luffy_paper": dr_grpo(0.01),
    "dr_grpo_luffy_code": dr_grpo(0.001),
    "sft_then_rl_luffy_paper": sft_then_rl,
    "fixed_chord_paper": fixed_chord,
    "rl_with_sft_loss_luffy_code": rl_with_sft_loss,
    "superrl_paper": superrl(lambda rewards: max(rewards) == 0),
    "superrl_a_paper": superrl(lambda rewards: len(set(rewards)) == 1),
    "luffy_paper": lambda prompts: luffy(prompts, member_mean_over_8192, std=False, clip=False, coef=0.01),
    "luffy_code": lambda prompts: luffy(prompts, member_mean_over_8192, std=False, clip=False, coef=0.001),
    "luffy_equations": lambda prompts: luffy(prompts, group_token_mean, std=True, clip=True, coef=0.0),
    "srft_paper": srft_paper,
    "srft_hpt_code": srft_hpt_code,
    "chord_mu_paper": chord(0.9, False),
    "chord_phi_paper": chord(0.1, True),
    "chord_code": chord(0.0, True, dual=3.0),
    "hpt_paper": hpt(0.0),
    "hpt_llama_paper": hpt(0.25),
    "prefix_rft_paper": prefix_rft(True, 0.0, None),
    "prefix_rft_code": prefix_rft(True, 0.001, 3.0),
    "trapo_paper": trapo(own_mean, std=True, clip=True, coef=0.0),
    "trapo_code": trapo(over_8192, std=False, clip=False, coef=0.001),
    "hpt_code": hpt(0.0, over_8192, std=False, clip=False, sft_scale=0.1, coef=0.001),
}
"""Preset → its loss at step 0."""
