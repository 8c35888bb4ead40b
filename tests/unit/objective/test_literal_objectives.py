"""The gradient of every objective by every token's log-prob, through weights, packing and loss, against eq. 4.

The weights of the terms differ from each other and from one, so that no two terms can be exchanged.
"""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from megatron_dypo.batching.pack import pack
from megatron_dypo.config.objective import ImportanceConfig, ObjectiveConfig
from megatron_dypo.objective.loss import token_loss
from megatron_dypo.objective.recipes.registry import build_objective
from megatron_dypo.objective.totals import add_counts, count_groups
from megatron_dypo.types import Treatment
from tests.support.dist.literal_objective import loss_of_logprobs
from tests.support.objective_cases import loss_inputs, random_groups

MODES = ("sum", "sequence_mean", "token_mean", "constant")
OPTIONS = {
    "weights": {"alpha": 0.3, "gamma": 1.7, "beta_gal": 0.6, "kl_coef": 0.2},
    "other weights": {"alpha": 0.8, "gamma": 0.4, "beta_gal": 2.5},
    "grpo alone": {"alpha": 1.0, "gamma": 3.0, "kl_coef": 0.05},
    "gal alone": {"alpha": 0.0, "gamma": 0.5},
    "centred": {"alpha": 0.25, "normalize_std": False, "kl_coef": 0.3},
    "epsilon": {"alpha": 0.6, "advantage_epsilon": 0.5, "clip_low": 0.1, "clip_high": 0.3},
    "stale": {"alpha": 0.3, "gal_coefficients": "stale", "gal_clip": "token"},
    "corrected": {"alpha": 0.3, "kl_coef": 0.1, "importance": ImportanceConfig(cap=1.1, token_bounds=(0.6, 1.7))},
}
NAMES = ("dypo", "grpo", "sft", "sft_then_rl")


def batch(seed=0):
    """Make groups of unequal sizes and lengths whose shaped rewards disagree with the flags, with log-probs."""
    rng = np.random.default_rng(seed)
    groups = [
        *random_groups(seed, num_hard=3, num_mid=3),
        *random_groups(seed + 50, num_hard=0, num_mid=2, group_size=7),
    ]
    for order, group in enumerate(groups):
        for sample in group:
            sample.order, sample.reward = order, float(rng.normal())
    logps = []
    for sample in (s for g in groups for s in g):
        near = sample.old_logp
        if near is not None:
            sample.rollout_logp = near + rng.normal(0, 0.3, len(near)).astype(np.float32)
            sample.ref_logp = near + rng.normal(0, 0.5, len(near)).astype(np.float32)
        near = np.full(sample.num_response_tokens, -2.0) if near is None else near
        logps.append(near.astype(np.float64) + rng.normal(0, 0.3, len(near)))
    return groups, logps


def config_of(name, mode, options):
    return ObjectiveConfig(name=name, sft_steps=1, length_normalization=mode, constant_length=5, **OPTIONS[options])


def ours(groups, logps, cfg, step=5):
    """Return loss, gradient of each sample and named sums, in float64."""
    objective = build_objective(cfg)
    totals = add_counts([count_groups(groups[:3]), count_groups(groups[3:])])
    it, weighted = iter(logps), []
    for group in groups:
        if objective.needs_current_logprobs():
            group = [
                dataclasses.replace(s, current_logp_sum=float(logp.sum())) for s, logp in zip(group, it, strict=False)
            ]
        weights = objective.token_weights(group, totals, step).weights
        weighted += [dataclasses.replace(s, weights=w) for s, w in zip(group, weights, strict=True)]
    microbatch = pack(weighted, range(len(weighted)), sum(len(s.tokens) for s in weighted))
    at = np.flatnonzero(microbatch.response_T)
    x = loss_inputs(len(at), sequence=microbatch.sequence_T[at], **{n: v[at] for n, v in microbatch.streams.items()})
    logp_N = torch.tensor(np.concatenate(logps), requires_grad=True)
    loss, sums = token_loss(logp_N, torch.zeros_like(logp_N), x, cfg)
    loss.backward()
    return (
        loss.item(),
        logp_N.grad.split([len(logp) for logp in logps]),
        {name: float(value) for name, value in sums.items()},
    )


def literal(groups, logps, cfg):
    variables = [torch.tensor(logp, requires_grad=True) for logp in logps]
    it = iter(variables)
    loss_of_logprobs([[next(it) for _ in group] for group in groups], groups, cfg).backward()
    return [v.grad for v in variables]


def kept(name, groups, logps):
    """Return the groups that an objective may get: traces, rollouts, or both."""
    kinds = {"grpo": [Treatment.REINFORCE], "sft": [Treatment.DISTILL]}.get(name, list(Treatment))
    pairs = zip((s for g in groups for s in g), logps, strict=True)
    return [g for g in groups if g[0].treatment in kinds], [logp for s, logp in pairs if s.treatment in kinds]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_every_token_is_the_literal_objectives(name, mode, options):
    groups, logps = kept(name, *batch())
    cfg = config_of(name, mode, options)
    mine, expected = torch.cat(ours(groups, logps, cfg)[1]), torch.cat(literal(groups, logps, cfg))
    # Weights are packed in fp32, and terms may cancel.
    torch.testing.assert_close(mine, expected, rtol=1e-6, atol=3e-7 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["dypo", "grpo", "sft_then_rl"])
def test_each_set_of_options_and_each_mode_changes_the_literal_gradient(name):
    """Otherwise the comparison would not test the options."""
    groups, logps = kept(name, *batch())
    seen = [torch.cat(literal(groups, logps, config_of(name, *case))) for case in itertools.product(MODES, OPTIONS)]
    same = [(a - b).abs().max() / b.abs().max() for a, b in itertools.combinations(seen, 2)]
    # GAL's own options do not affect the others.
    assert sum(error < 1e-3 for error in same) <= (0 if name == "dypo" else 4 * 3)


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_is_linear_in_alpha_and_gamma(mode):
    groups, logps = batch(3)

    def gradient(alpha, gamma):
        return torch.cat(
            ours(
                groups, logps, ObjectiveConfig(alpha=alpha, gamma=gamma, length_normalization=mode, constant_length=5)
            )[1]
        )

    grpo, gal, taught = gradient(1.0, 0.0), gradient(0.0, 0.0), gradient(1.0, 1.0) - gradient(1.0, 0.0)
    expected = 0.7 * grpo + 0.3 * gal + 2.5 * taught
    torch.testing.assert_close(gradient(0.7, 2.5), expected, rtol=1e-5, atol=1e-9)
    assert all(part.abs().max() > 1e-4 for part in (grpo, gal, taught))


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_of_the_log_is_the_literal_value(mode):
    """It is the share of the tokens plus that of groups with GAL, of which the loss itself has only the gradient."""
    groups, logps = batch(4)
    cfg = config_of("dypo", mode, "weights")
    objective, totals = build_objective(cfg), add_counts([count_groups(groups)])
    it, share = iter(logps), 0.0
    for group in groups:
        scored = [
            dataclasses.replace(s, current_logp_sum=float(logp.sum())) for s, logp in zip(group, it, strict=False)
        ]
        share += objective.token_weights(scored, totals, 5).sums.get("objective", 0.0)
    sums = ours(groups, logps, cfg)[2]
    it = iter(torch.tensor(logp) for logp in logps)
    expected = loss_of_logprobs([[next(it) for _ in group] for group in groups], groups, cfg).item()
    assert sums["objective"] + share == pytest.approx(expected, rel=1e-6)
    assert abs(share) > 1e-3 * abs(expected)
