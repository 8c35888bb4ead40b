"""The losses of published methods as their papers and codes write them, one prompt after the other, in float64.

Each row of :data:`EQUATIONS` is what a preset promises: numbers stand here as they are published, not as the config has
them. Where a publication shapes a gradient by the derivative of its loss, so does this: the trainer's shapes are checked
against autograd. ``p`` is a prompt: ``p.rollouts`` and ``p.trace`` have ``logp``, ``entropy``, ``old`` ([R] tensors, the
first two with gradient) and ``reward``.
"""

import math

import torch


def advantages(rewards, std):
    mean = sum(rewards) / len(rewards)
    centred = [reward - mean for reward in rewards]
    if not std or all(value == 0 for value in centred):
        return centred
    deviation = math.sqrt(sum(value**2 for value in centred) / (len(centred) - 1))
    return [value / (deviation + 1e-6) for value in centred]


def surrogate(y, advantage, low=0.2, high=0.2, dual=None):
    """[R] −C(ρ, Â); ``low`` None: no clip."""
    ratio = (y.logp - y.old).exp()
    if low is None:
        return -ratio * advantage
    value = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    if dual is not None and advantage < 0:
        value = torch.maximum(value, torch.full_like(value, dual * advantage))
    return -value


def length(y):
    return len(y.logp)


def own_mean(tokens, _):
    return tokens.sum() / len(tokens)


def total(tokens, _):
    return tokens.sum()


def over_8192(tokens, _):
    return tokens.sum() / 8192


def grpo(rollouts, reduce, *, std=True, low=0.2, high=0.2, dual=None):
    """One prompt's (1/k) Σ_i reduce(−C)."""
    scores = advantages([y.reward for y in rollouts], std)
    terms = [reduce(surrogate(y, a, low, high, dual), y) for y, a in zip(rollouts, scores, strict=True)]
    return sum(terms) / len(rollouts)


def entropy_bonus(sequences, coef):
    """−coef times the mean entropy of all tokens."""
    entropies = torch.cat([y.entropy for y in sequences])
    return -coef * entropies.mean()


def token_mean_nll(traces, factor=lambda y: 1.0):
    return sum((-factor(y) * y.logp).sum() for y in traces) / max(sum(map(length, traces)), 1)


def rollouts_of(prompts, count=None):
    return [y for p in prompts for y in p.rollouts[:count]]


def traces_of(prompts):
    return [p.trace for p in prompts]


def sft(prompts):
    mean = sum(map(length, traces_of(prompts))) / len(prompts)
    return sum(-p.trace.logp.sum() / mean for p in prompts) / len(prompts)


def dr_grpo(coef):
    def loss(prompts):
        terms = [grpo(p.rollouts, over_8192, std=False) for p in prompts]
        return sum(terms) / len(prompts) + entropy_bonus(rollouts_of(prompts), coef)

    return loss


def sft_then_rl(prompts):
    """The first phase: supervised, normalised and with the entropy bonus as the second."""
    terms = [-p.trace.logp.sum() / 8192 for p in prompts]
    return sum(terms) / len(prompts) + entropy_bonus(traces_of(prompts), 0.01)


def token_mean_grpo(prompts, **clip):
    parts = []
    for p in prompts:
        scores = advantages([y.reward for y in p.rollouts], True)
        parts += [surrogate(y, a, **clip) for y, a in zip(p.rollouts, scores, strict=True)]
    return torch.cat(parts).mean()


def fixed_chord(prompts):
    return 0.9 * token_mean_grpo(prompts) + 0.1 * token_mean_nll(traces_of(prompts))


def rl_with_sft_loss(prompts):
    """Up to the scale 1/1.1: a sum over sequences with 64 of the policy and 6.4 of the supervised term, over 64."""
    rl = sum(grpo(p.rollouts[:-1], over_8192, std=False, low=None) for p in prompts) / len(prompts)
    loss = (rl + 0.1 * token_mean_nll(traces_of(prompts))) / 1.1
    return loss + entropy_bonus([*rollouts_of(prompts, -1), *traces_of(prompts)], 0.001)


def superrl(is_supervised):
    def loss(prompts):
        terms = []
        for p in prompts:
            if is_supervised([y.reward for y in p.rollouts]):
                terms.append(own_mean(-p.trace.logp, p.trace))
            else:
                terms.append(grpo(p.rollouts, own_mean))
        return sum(terms) / len(prompts)

    return loss


def luffy(prompts, reduce, *, std, clip, coef, gamma=0.1):
    terms = []
    for p in prompts:
        members = [*p.rollouts[:-1], p.trace]
        scores = advantages([y.reward for y in members], std)
        clips = (0.2, 0.2) if clip else (None, None)
        tokens = [surrogate(y, a, *clips) for y, a in zip(members[:-1], scores[:-1], strict=True)]
        probability = p.trace.logp.exp()
        tokens.append(-scores[-1] * probability / (probability + gamma))
        terms.append(reduce(tokens, members))
    loss = sum(terms) / len(prompts)
    return loss + (entropy_bonus([*rollouts_of(prompts, -1), *traces_of(prompts)], coef) if coef else 0.0)


def member_mean_over_8192(tokens, members):
    return sum(token.sum() for token in tokens) / (8192 * len(members))


def group_token_mean(tokens, _):
    return torch.cat(tokens).mean()


def mean_entropy(y):
    return y.entropy.detach().mean()


def srft_self(rollouts, count, reduce):
    right = sum(0.1 * mean_entropy(y).exp() * reduce(-y.logp, y) for y in rollouts if y.reward > 0)
    wrong = sum(reduce(y.logp, y) for y in rollouts if y.reward <= 0)
    return (right + wrong) / count


def srft_paper(prompts):
    terms = []
    for p in prompts:
        star = advantages([y.reward for y in (*p.rollouts, p.trace)], True)[-1]
        supervised = 0.5 * (-mean_entropy(p.trace)).exp() * -p.trace.logp.sum()
        policy = -(p.trace.logp.exp() * star).sum()
        terms.append(supervised + policy + srft_self(p.rollouts, len(p.rollouts), total))
    return sum(terms) / len(prompts)


def srft_hpt_code(prompts):
    terms = []
    for p in prompts:
        members = [*p.rollouts[:-1], p.trace]
        star = advantages([y.reward for y in members], False)[-1]
        probability = p.trace.logp.exp()
        policy = over_8192(-star * probability / (probability + 0.1), p.trace) / len(members)
        terms.append(policy + srft_self(p.rollouts[:-1], len(members), over_8192))
    supervised = token_mean_nll(traces_of(prompts), lambda y: 0.5 * (-mean_entropy(y)).exp())
    return sum(terms) / len(prompts) + 0.1 * supervised


def chord(mu, phi, **clip):
    def weight(y):
        probability = y.logp.detach().exp()
        return probability * (1 - probability) if phi else 1.0

    def loss(prompts):
        return (1 - mu) * token_mean_grpo(prompts, **clip) + mu * token_mean_nll(traces_of(prompts), weight)

    return loss


def hpt(gate, reduce=total, *, std=True, clip=True, sft_scale=None, coef=0.0):
    """``sft_scale`` None: the mean over prompts of each trace's mean; else that times one token mean of all traces."""

    def loss(prompts):
        clips = {} if clip else {"low": None}
        rl, supervised = [], []
        for p in prompts:
            few = sum(y.reward > 0 for y in p.rollouts) <= gate * len(p.rollouts)
            (supervised if few else rl).append(p)
        value = sum(grpo(p.rollouts, reduce, std=std, **clips) for p in rl) / len(prompts)
        if sft_scale is None:
            value = value + sum(own_mean(-p.trace.logp, p.trace) for p in supervised) / len(prompts)
        else:
            value = value + sft_scale * token_mean_nll(traces_of(supervised))
        return value + (entropy_bonus([*rollouts_of(rl), *traces_of(supervised)], coef) if coef else 0.0)

    return loss


EQUATIONS = {
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
    "hpt_code": hpt(0.0, over_8192, std=False, clip=False, sft_scale=0.1, coef=0.001),
}
"""Preset → its loss at step 0."""
