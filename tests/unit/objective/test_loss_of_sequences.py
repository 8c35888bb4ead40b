"""The sequence ratio, GAL's trust region and the mismatch correction, against loops over sequences and tokens."""

import math

import numpy as np
import pytest
import torch

from megatron_dypo.config.data import DataConfig
from megatron_dypo.config.model import ModelConfig
from megatron_dypo.config.objective import ImportanceConfig, ObjectiveConfig, OldLogpConfig
from megatron_dypo.config.tree import Config
from megatron_dypo.objective.loss import token_loss
from tests.support.objective_cases import loss_inputs

LENGTHS = (5, 1, 7, 3, 4)
IS_TRACE = (False, False, False, True, False)


def streams(seed=0, spread=0.4):
    """Make sequences of LENGTHS with weights like the objectives', shuffled in the microbatch, and log-probs."""
    rng = np.random.default_rng(seed)
    by_sequence = {name: rng.normal(size=len(LENGTHS)) for name in ("advantage", "nll_weight")}
    by_sequence |= {name: rng.uniform(0.1, 1, len(LENGTHS)) for name in ("pg_weight", "kl_weight")}
    by_sequence["gal_scale"] = np.where(IS_TRACE, 0, 1 / np.array(LENGTHS))
    by_sequence["is_trace"] = np.array(IS_TRACE, float)
    for name in ("advantage", "pg_weight", "kl_weight"):
        by_sequence[name][list(IS_TRACE)] = 0
    sequence = rng.permutation(np.repeat(np.arange(len(LENGTHS)), LENGTHS))
    given = {name: values[sequence] for name, values in by_sequence.items()} | {"sequence": sequence}
    old = rng.normal(-2, 0.5, len(sequence))
    shift = rng.normal(0, spread, len(LENGTHS))[sequence]  # whole sequences drift too, not tokens alone
    given |= {"old_logp": old, "ref_logp": old + rng.normal(0, 0.3, len(old))}
    given["rollout_logp"] = old + rng.normal(0, spread, len(old)) + rng.normal(0, spread / 2, len(LENGTHS))[sequence]
    return old + shift + rng.normal(0, spread, len(old)), given


def literal(logp, x, cfg):
    """Compute the loss of each sequence on its own, token by token, as the docstrings of config and loss define it."""
    total = 0.0
    for i in range(len(LENGTHS)):
        at = [t for t in range(len(logp)) if x["sequence"][t] == i]
        logs = [logp[t] - x["old_logp"][t] for t in at]
        u = [math.exp(x["old_logp"][t] - x["rollout_logp"][t]) for t in at]
        if IS_TRACE[i]:
            total = total - sum(x["nll_weight"][t] * logp[t] for t in at)
            continue
        if whole_is_masked(u, cfg.importance):
            continue
        s = torch.exp(sum(logs) / len(at))
        if cfg.ratio == "sequence" and not cfg.importance.is_on():
            # GSPO itself: one ratio, one surrogate; its weight is the sum of its tokens' weights.
            total = total + sum(x["pg_weight"][t] for t in at) * surrogate(s, x["advantage"][at[0]], cfg)
        for t, log, value in zip(at, logs, u, strict=True):
            low, high = cfg.importance.token_bounds or (0, math.inf)
            if not low <= value <= high:
                continue
            if cfg.ratio == "token" or cfg.importance.is_on():
                # GSPO-token, where tokens of a sequence differ in weight: s in value, s·∇log π of the
                # token in gradient.
                rho = log.exp() if cfg.ratio == "token" else s.detach() * (log - log.detach()).exp()
                total = total + x["pg_weight"][t] * capped(value, cfg) * surrogate(rho, x["advantage"][t], cfg)
            delta = x["ref_logp"][t] - logp[t]
            total = total + x["kl_weight"][t] * (delta.exp() - delta - 1)
            ratio = {"none": 1.0, "token": log.exp().item(), "sequence": s.item()}[cfg.gal_clip]
            stopped = ratio > 1 + cfg.clip_high if x["nll_weight"][t] > 0 else ratio < 1 - cfg.clip_low
            if not stopped:
                total = total - x["nll_weight"][t] * logp[t]
    return total


def whole_is_masked(u, cfg):
    mean = math.prod(u) ** (1 / len(u))
    low, high = cfg.sequence_bounds or (0, math.inf)
    gap = sum(abs(math.log(value)) for value in u) / len(u)
    return not low <= mean <= high or gap > (cfg.sequence_max_gap or math.inf)


def capped(u, cfg):
    return 1.0 if cfg.importance.cap is None else min(u, cfg.importance.cap)


def surrogate(ratio, advantage, cfg):
    bounded = torch.clamp(ratio, 1 - cfg.clip_low, 1 + cfg.clip_high)
    return -torch.minimum(ratio * advantage, bounded * advantage)


def ours(logp, given, cfg):
    logp_N = torch.tensor(logp, requires_grad=True)
    loss, sums = token_loss(logp_N, torch.zeros_like(logp_N), loss_inputs(len(logp), **given), cfg)
    loss.backward()
    return loss.item(), logp_N.grad, {name: float(value) for name, value in sums.items()}


CONFIGS = {
    "token ratio": {},
    "gspo": {"ratio": "sequence"},
    "gspo with a narrow region": {"ratio": "sequence", "clip_low": 0.05, "clip_high": 0.1},
    "gspo-token": {"ratio": "sequence", "importance": ImportanceConfig(cap=1.2, token_bounds=(0.5, 2.0))},
    "gal clipped by token": {"gal_clip": "token"},
    "gal clipped by sequence": {"gal_clip": "sequence", "clip_low": 0.1, "clip_high": 0.15},
    "truncated": {"importance": ImportanceConfig(cap=1.1)},
    "icepop": {"importance": ImportanceConfig(cap=1.5, token_bounds=(0.7, 1.5))},
    "geometric mean": {"importance": ImportanceConfig(sequence_bounds=(0.9, 1.1))},
    "mean gap": {"importance": ImportanceConfig(sequence_max_gap=0.35)},
    "all of them": {
        "gal_clip": "sequence",
        "importance": ImportanceConfig(
            cap=1.3, token_bounds=(0.6, 1.6), sequence_bounds=(0.5, 1.5), sequence_max_gap=0.4
        ),
    },
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("seed", range(4))
def test_gradient_equals_that_of_the_literal_sequence_loss(name, seed):
    cfg = ObjectiveConfig(**CONFIGS[name])
    logp, given = streams(seed)
    expected_N = torch.tensor(logp, requires_grad=True)
    literal(expected_N, given, cfg).backward()
    _, grad_N, _ = ours(logp, given, cfg)
    torch.testing.assert_close(grad_N, expected_N.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "token ratio"])
def test_each_option_changes_the_gradient_of_these_cases(name):
    """Otherwise the comparison above would not test the options."""
    cases = [streams(seed) for seed in range(4)]
    plain, other = ([ours(*c, ObjectiveConfig(**CONFIGS[n]))[1] for c in cases] for n in ("token ratio", name))
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(plain, other, strict=True))


def test_sequence_means_do_not_care_where_a_sequence_is_split():
    """Two halves of a microbatch that each get the sums of both equal the whole. Context parallelism needs this."""
    cfg = ObjectiveConfig(ratio="sequence", gal_clip="sequence", importance=ImportanceConfig(sequence_max_gap=0.35))
    logp, given = streams(3)
    _, grad_N, sums = ours(logp, given, cfg)
    halves = [slice(0, 9), slice(9, None)]
    seen, parts = [[], []], []
    for _ in range(4):  # sums become known one after the other, as each depends on none but local tokens
        parts = []
        for rank, half in enumerate(halves):
            calls = iter(range(100))

            def across(sum_S, rank=rank, calls=calls):
                index = next(calls)
                seen[rank][index:] = [sum_S, *seen[rank][index + 1 :]]
                other = seen[1 - rank]
                return sum_S + (other[index] if index < len(other) else 0)

            local_N = torch.tensor(logp[half], requires_grad=True)
            x = loss_inputs(len(local_N), num_sequences=len(LENGTHS), **{k: v[half] for k, v in given.items()})
            loss, local_sums = token_loss(local_N, torch.zeros_like(local_N), x, cfg, across)
            loss.backward()
            parts.append((local_N.grad, local_sums))
    torch.testing.assert_close(torch.cat([g for g, _ in parts]), grad_N)
    assert {name: sum(float(s[name]) for _, s in parts) for name in sums} == pytest.approx(sums)


def test_fractions_count_what_was_capped_and_masked():
    logs = [0.0, 0.5, -0.5, 0.1, 2.0, 1.0]
    given = {"rollout_logp": [-v for v in logs], "sequence": [0, 0, 0, 1, 2, 2], "gal_scale": [0, 0, 0, 1, 0, 0]}
    cfg = ImportanceConfig(cap=1.2, token_bounds=(0.7, 2.0), sequence_bounds=(0.5, 3.0), sequence_max_gap=0.3)
    *_, sums = ours([0.0] * 6, given, ObjectiveConfig(importance=cfg))
    assert sums["importance_capped"] == 3
    assert sums["importance_masked"] == 3
    assert (sums["rollouts"], sums["rollouts_masked"]) == pytest.approx((3, 2))
    assert sums["mismatch_abs"] == pytest.approx(4.1)


def test_a_masked_token_contributes_nothing_even_where_its_ratio_is_infinite():
    given = {
        "old_logp": [-800.0, -1.0], "rollout_logp": [-1.0, -1.0], "ref_logp": [-1.0, -1.0], "nll_weight": [0.5, 0.5],
        "advantage": [-1.0, -1.0], "pg_weight": [1.0, 1.0], "kl_weight": [1.0, 1.0], "sequence": [0, 1],
    }  # fmt: skip
    for option in ({"token_bounds": (0.5, 2.0)}, {"sequence_max_gap": 1.0}):
        for ratio in ("token", "sequence"):
            cfg = ObjectiveConfig(ratio=ratio, importance=ImportanceConfig(**option))
            loss, grad_N, _ = ours([-1.0, -1.0], given, cfg)
            assert grad_N[0] == 0
            assert grad_N[1] != 0
            assert math.isfinite(loss)


@pytest.mark.parametrize("mode", ["token", "sequence"])
def test_gal_is_stopped_only_in_the_direction_of_its_push(mode):
    cfg = ObjectiveConfig(gal_clip=mode, clip_low=0.2, clip_high=0.3)
    logs, nll = [0.3, 0.2, -0.3, -0.3, 0.3, -0.2], [1.0, 1.0, 1.0, -1.0, -1.0, -1.0]
    given = {"nll_weight": nll, "gal_scale": [1.0] * 6, "sequence": range(6)}
    _, grad_N, sums = ours(logs, given, cfg)
    assert (grad_N == 0).tolist() == [True, False, False, True, False, False]
    assert (sums["gal_clipped"], sums["gal_tokens"]) == (2, 6)
    constant = {**given, "gal_scale": [0.0] * 6}  # a likelihood term without a log-ratio is not GAL's
    assert not (ours(logs, constant, cfg)[1] == 0).any()


def test_gals_drift_is_the_distance_of_scaled_log_ratios():
    logp, given = streams(5)
    *_, sums = ours(logp, given, ObjectiveConfig())
    moved = np.array([(logp - given["old_logp"])[given["sequence"] == i].sum() for i in range(len(LENGTHS))])
    scaled = np.abs(moved / np.array(LENGTHS))[~np.array(IS_TRACE)]
    assert sums["gal_sequences"] == pytest.approx(4)
    assert sums["gal_drift"] == pytest.approx(scaled.sum())


def test_options_that_contradict_each_other_are_refused():
    for options in ({"cap": 0.0}, {"token_bounds": (2.0, 1.0)}, {"sequence_bounds": (-1.0, 1.0)}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ImportanceConfig(**options)
    with pytest.raises(ValueError, match=r"objective\.importance: needs old_logp\.source=trainer"):
        Config(
            model=ModelConfig(hf_path="m"),
            data=DataConfig(prompts=("p",)),
            old_logp=OldLogpConfig(source="server"),
            objective=ObjectiveConfig(importance=ImportanceConfig(cap=2.0)),
        )


def test_a_value_at_a_bound_is_inside_and_at_the_cap_is_not_capped():
    logs = [math.log(0.5), math.log(2.0), math.log(0.5) - 1e-9, math.log(2.0) + 1e-9]
    given = {"old_logp": logs, "sequence": [0, 1, 2, 3]}
    for option in ({"token_bounds": (0.5, 2.0)}, {"sequence_bounds": (0.5, 2.0)}):
        *_, sums = ours([0.0] * 4, given, ObjectiveConfig(importance=ImportanceConfig(**option)))
        assert sums["importance_masked"] + sums["rollouts_masked"] == 2
    *_, sums = ours([0.0] * 4, given, ObjectiveConfig(importance=ImportanceConfig(cap=2.0)))
    assert sums["importance_capped"] == 1
    gap = {"old_logp": [0.25, -0.25, 0.5], "sequence": [0, 0, 1]}
    *_, sums = ours([0.0] * 3, gap, ObjectiveConfig(importance=ImportanceConfig(sequence_max_gap=0.25)))
    assert sums["rollouts_masked"] == 1


def test_a_ratio_at_a_bound_of_the_clip_is_not_clipped():
    cfg = ObjectiveConfig(clip_low=0.25, clip_high=0.5, dual_clip=4.0, gal_clip="token")
    at = [math.log1p(0.5), math.log1p(-0.25), math.log(4.0)]
    given = {
        "advantage": [1.0, -1.0, -1.0],
        "pg_weight": [1.0] * 3,
        "sequence": [0, 1, 2],
        "nll_weight": [1.0, -1.0, 0.0],
        "gal_scale": [1.0] * 3,
    }
    *_, sums = ours(np.array(at), given, cfg)
    assert (sums["clipped"], sums["gal_clipped"]) == (0, 0)
    beyond = [at[0] + 1e-9, at[1] - 1e-9, at[2] + 1e-9]
    *_, sums = ours(np.array(beyond), given, cfg)
    assert (sums["clipped"], sums["gal_clipped"]) == (3, 2)


def test_no_token_of_a_trace_is_capped_whatever_the_cap():
    x = loss_inputs(
        4,
        is_trace=[1, 1, 0, 0],
        nll_weight=[0.5] * 4,
        sequence=[0, 0, 1, 1],
        old_logp=[0, 0, -1.0, -1.0],
        rollout_logp=[0, 0, -1.0, -0.5],
    )
    cfg = ObjectiveConfig(importance=ImportanceConfig(cap=0.7))
    _, sums = token_loss(torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64), x, cfg)
    assert {name: float(value) for name, value in sums.items()}["importance_capped"] == 1, (
        "u is 1 and e^-0.5 on the rollout"
    )
