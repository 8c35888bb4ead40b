"""The loss in fp32 with ratios that over- or underflow, and with inputs that are not numbers."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_dypo.config.objective import ImportanceConfig, ObjectiveConfig
from megatron_dypo.objective.loss import token_loss
from megatron_dypo.objective.shapes import SHAPES, shape_index
from tests.support.literal_tokens import literal_tokens
from tests.support.objective_cases import loss_inputs

ALL_MASKS = ImportanceConfig(cap=1.3, token_bounds=(0.5, 2.0), sequence_bounds=(0.6, 1.7), sequence_max_gap=0.4)
CONFIGS = {
    "plain": ObjectiveConfig(),
    "asymmetric": ObjectiveConfig(clip_low=0.1, clip_high=0.28),
    "hardly clipped": ObjectiveConfig(clip_low=0.999, clip_high=1e8),
    "dual": ObjectiveConfig(dual_clip=3.0),
    "gspo": ObjectiveConfig(ratio="sequence", clip_low=0.05, clip_high=0.1),
    "gspo, dual": ObjectiveConfig(ratio="sequence", dual_clip=1e8),
    "truncated": ObjectiveConfig(importance=ImportanceConfig(cap=2.0)),
    "masked": ObjectiveConfig(importance=ALL_MASKS, gal_clip="token", dual_clip=2.0),
    "masked gspo": ObjectiveConfig(importance=ALL_MASKS, gal_clip="sequence", ratio="sequence"),
    "gal by token": ObjectiveConfig(gal_clip="token", clip_low=0.3),
    "not clipped": ObjectiveConfig(clip_low=None, clip_high=None, dual_clip=3.0),
    "clipped above alone": ObjectiveConfig(clip_low=None, clip_high=0.28),
    "gal by sequence": ObjectiveConfig(gal_clip="sequence", clip_high=0.4),
}


def run(logp, given, cfg, dtype=torch.float32, entropy=None):
    """Return loss, gradient and named sums for streams in ``dtype``."""
    given = {**given, "nll_shape": [shape_index(name) for name in given.get("shape", ["constant"] * len(logp))]}
    x = loss_inputs(len(logp), **{name: values for name, values in given.items() if name != "shape"})
    typed = {name: v if v.dtype == torch.bool else v.to(dtype) for name, v in x.streams.items()}
    x = dataclasses.replace(x, streams=typed)
    logp_N = torch.tensor(logp, dtype=dtype, requires_grad=True)
    entropy_N = torch.zeros_like(logp_N) if entropy is None else torch.tensor(entropy, dtype=dtype)
    loss, sums = token_loss(logp_N, entropy_N.detach(), x, cfg)
    loss.backward()
    return loss.item(), logp_N.grad, {name: float(value) for name, value in sums.items()}


OTHER_TERMS = {"pg_weight": [0.5], "kl_weight": [0.25], "nll_weight": [0.125], "gal_scale": [1.0], "ref_logp": [-1.0]}


@pytest.mark.parametrize("options", [{}, {"ratio": "sequence"}, {"gal_clip": "sequence"}, {"dual_clip": 3.0}])
def test_a_clipped_token_has_no_surrogate_gradient_however_large_its_ratio(options):
    given = {"old_logp": [-90.0], "advantage": [1.0], "pg_weight": [1.0]}
    loss, grad, sums = run([-1.0], given, ObjectiveConfig(**options))
    assert (loss, grad.tolist(), sums["clipped"]) == (pytest.approx(-1.2), [0.0], 1.0)


def test_a_dual_clipped_token_has_no_gradient_and_one_without_advantage_no_loss():
    given = {"old_logp": [-900.0], "advantage": [-1.0], "pg_weight": [1.0]}
    assert run([-1.0], given, ObjectiveConfig(dual_clip=3.0))[:2] == (3.0, torch.zeros(1))
    for cfg in CONFIGS.values():
        loss, grad, sums = run([-1.0], {**given, "advantage": [0.0]}, cfg)
        assert (loss, grad.tolist(), sums["clipped"]) == (0.0, [0.0], 0.0)


@pytest.mark.parametrize("advantage", [1.0, 0.0])
def test_the_other_terms_of_a_token_survive_its_clip(advantage):
    _, grad, _ = run([-2.0], {**OTHER_TERMS, "old_logp": [-99.0], "advantage": [advantage]}, ObjectiveConfig())
    assert grad.item() == pytest.approx(0.25 * (1 - math.exp(1.0)) - 0.125)


def test_what_no_clip_bounds_goes_on_by_the_tangent():
    for shift in (30.0, 90.0, 700.0):
        far = {"old_logp": [-shift], "advantage": [-2.0], "pg_weight": [0.5]}
        _, grad, sums = run([0.0], far, ObjectiveConfig())
        assert grad.item() == pytest.approx(math.exp(20))
        assert sums["pg"] == pytest.approx(math.exp(20) * (1 + shift - 20))
        _, grad, sums = run([-shift], {"ref_logp": [0.0], "kl_weight": [0.5]}, ObjectiveConfig())
        assert grad.item() == pytest.approx(0.5 * (1 - math.exp(20)))
        assert sums["kl"] == pytest.approx(0.5 * (math.exp(20) * (1 + shift - 20) - shift - 1))


def test_value_and_gradient_do_not_jump_where_the_tangent_begins():
    for log in (20.0, np.nextafter(np.float32(20), np.float32(0)), np.nextafter(np.float32(20), np.float32(99))):
        loss, grad, _ = run([0.0], {"old_logp": [-log], "advantage": [-1.0], "pg_weight": [1.0]}, ObjectiveConfig())
        assert (loss, grad.item()) == (pytest.approx(math.exp(20), rel=1e-5), pytest.approx(math.exp(20), rel=1e-5))


def test_k3_keeps_its_digits_near_the_reference():
    for delta in (1e-3, -1e-3, 2.0**-12):
        loss, _, _ = run([-1.0], {"ref_logp": [delta - 1.0], "kl_weight": [1.0]}, ObjectiveConfig())
        exact = float(np.float32(delta - 1.0)) + 1.0
        assert loss == pytest.approx(math.expm1(exact) - exact, rel=1e-3)


LOGPS = st.one_of(
    st.sampled_from([0.0, -1.0, -1.1, -21.0, -90.0, -105.0, -700.0, -1e-6]),
    st.floats(-700, 0, width=32),
    st.floats(-4, 0, width=32),
)
UNITS = st.floats(0.0009765625, 1, width=32)


@st.composite
def microbatches(draw):
    """Draw (log-probs, entropies, streams): up to four sequences, also traces, with weights like the objectives'."""
    sequence = sorted(draw(st.lists(st.integers(0, 3), min_size=1, max_size=8)))
    sequence = [sorted(set(sequence)).index(s) for s in sequence]
    count, length = sequence[-1] + 1, len(sequence)
    traces = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    is_trace = [traces[s] for s in sequence]

    def of_sequences(values, none=0.0, traces_too=False):
        drawn = draw(st.lists(values, min_size=count, max_size=count))
        return [none if traces[s] and not traces_too else drawn[s] for s in sequence]

    given = {"sequence": sequence, "is_trace": is_trace}
    given["advantage"] = of_sequences(st.sampled_from([0.0, 1.0, -1.0, -0.25, 2.5, -7.0]))
    given |= {name: of_sequences(st.one_of(st.just(0.0), UNITS)) for name in ("pg_weight", "kl_weight", "gal_scale")}
    given["shape"] = of_sequences(st.sampled_from(tuple(SHAPES)), none="constant", traces_too=True)
    given["shape_constant"] = of_sequences(UNITS, traces_too=True)
    given["entropy_weight"] = of_sequences(st.one_of(st.just(0.0), UNITS), traces_too=True)
    nll = draw(st.lists(st.one_of(UNITS, UNITS.map(lambda v: -v), st.just(0.0)), min_size=count, max_size=count))
    given["nll_weight"] = [nll[s] for s in sequence]
    for name in ("old_logp", "ref_logp", "rollout_logp"):
        given[name] = draw(st.lists(LOGPS, min_size=length, max_size=length))
    if draw(st.booleans()):  # so near that the masks keep some tokens
        near = draw(st.lists(st.floats(-0.5, 0.5, width=32), min_size=length, max_size=length))
        given["rollout_logp"] = [float(np.float32(o - d)) for o, d in zip(given["old_logp"], near, strict=True)]
    logp = draw(st.lists(LOGPS, min_size=length, max_size=length))
    return logp, draw(st.lists(UNITS, min_size=length, max_size=length)), given


def compare(name, case, dtype, rtol):
    logp, entropy, given = case
    expected = literal_tokens(logp, entropy, given, CONFIGS[name])
    assume(expected.distance > 1e-3)
    loss, grad, sums = run(logp, given, CONFIGS[name], dtype, entropy)
    assert math.isfinite(loss)
    assert abs(loss - expected.loss) <= rtol * (expected.size + 1)
    size = torch.tensor(expected.gradient_size, dtype=torch.float64) + 1
    assert ((grad.double() - torch.tensor(expected.gradient, dtype=torch.float64)).abs() <= rtol * size).all()
    for key in sums:
        wanted = expected.sums.get(key, 0.0)
        scale = (
            expected.size
            if key in ("objective", "pg", "kl", "sft", "rollout_nll", "entropy_bonus")
            else sum(map(abs, logp)) + 700 * len(logp)
        )
        assert abs(sums[key] - wanted) <= rtol * (scale + 1), key


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=30, derandomize=True)
@given(case=microbatches())
def test_fp32_is_close_to_a_literal_float64_loss_over_extreme_inputs(name, case):
    compare(name, case, torch.float32, 3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=1000)
@given(case=microbatches())
def test_fp32_is_close_to_a_literal_float64_loss_over_many_extreme_inputs(name, case):
    compare(name, case, torch.float32, 3e-5)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=25, derandomize=True)
@given(case=microbatches())
def test_loss_gradient_and_every_sum_equal_the_literal_ones_in_float64(name, case):
    compare(name, case, torch.float64, 1e-12)


NOT_NUMBERS = (math.nan, math.inf, -math.inf)


def two_tokens(**changes):
    """Return a token of each of two rollouts; no mask applies to them."""
    given = {
        "advantage": [1.0, -1.0],
        "pg_weight": [0.5, 0.5],
        "kl_weight": [0.1, 0.1],
        "nll_weight": [0.2, -0.2],
        "gal_scale": [1.0, 1.0],
        "old_logp": [-1.0, -1.0],
        "ref_logp": [-1.2, -1.2],
        "rollout_logp": [-1.0, -1.0],
        "sequence": [0, 1],
    }
    return {**given, **changes}


@pytest.mark.parametrize("bad", NOT_NUMBERS)
@pytest.mark.parametrize("stream", ["logp", "old_logp", "ref_logp"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_masked_token_may_hold_anything(name, stream, bad):
    """Its rollout log-prob masks it. Loss, the other token's gradient and all sums are as if it held numbers."""
    importance = ImportanceConfig(token_bounds=(0.5, 2.0), sequence_bounds=(0.5, 2.0))
    cfg = ObjectiveConfig(**{**vars(CONFIGS[name]), "importance": importance})
    given, logp = two_tokens(rollout_logp=[-9.0, -1.0]), [-1.1, -1.1]
    loss, grad, sums = run(logp, given, cfg)
    if stream == "logp":
        worse = run([bad, -1.1], given, cfg)
    else:
        worse = run(logp, {**given, stream: [bad, -1.0 if stream == "old_logp" else -1.2]}, cfg)
    assert worse[0] == loss
    assert worse[1].tolist() == grad.tolist() == [0.0, grad[1].item()]
    assert all(map(math.isfinite, worse[2].values()))
    assert worse[2]["importance_masked"] == sums["importance_masked"] == 1
    for key in ("pg", "kl", "sft", "clipped", "tokens", "rollouts_masked"):
        assert worse[2][key] == sums[key]


@pytest.mark.parametrize("bad", NOT_NUMBERS)
@pytest.mark.parametrize(
    "option", [{"token_bounds": (0.5, 2.0)}, {"sequence_bounds": (0.5, 2.0)}, {"sequence_max_gap": 9.0}]
)
def test_a_servers_log_prob_that_is_no_number_is_inside_no_bounds(option, bad):
    cfg = ObjectiveConfig(importance=ImportanceConfig(cap=3.0, **option))
    _, grad, sums = run([-1.1, -1.1], two_tokens(rollout_logp=[bad, -1.0]), cfg)
    assert grad[0] == 0
    assert math.isfinite(grad[1])
    assert grad[1] != 0
    assert sums["importance_masked"] + sums["rollouts_masked"] == 1


@pytest.mark.parametrize(
    "stream", ["logp", "old_logp", "ref_logp", "advantage", "pg_weight", "kl_weight", "nll_weight"]
)
@pytest.mark.parametrize("name", [n for n in CONFIGS if CONFIGS[n].importance == ImportanceConfig()])
def test_what_is_no_number_on_a_kept_token_shows_in_its_gradient(name, stream):
    for bad, advantage in itertools.product(NOT_NUMBERS, (1.0, 0.0, -1.0)):
        given = {"logp": [-1.1, -1.1], **two_tokens(advantage=[advantage, -1.0])}
        given[stream] = [bad, given[stream][1]]
        loss, grad, _ = run(given.pop("logp"), given, CONFIGS[name])
        assert math.isnan(grad[0])
        assert not math.isfinite(loss)
        assert math.isfinite(grad[1])


@pytest.mark.parametrize("bad", NOT_NUMBERS)
def test_a_trace_whose_log_prob_is_no_number_shows_and_its_other_streams_are_not_read(bad):
    given = {"is_trace": [1, 1], "nll_weight": [0.5, 0.5], "sequence": [0, 1]}
    assert math.isnan(run([bad, -1.0], given, ObjectiveConfig())[1][0])
    unread = {name: [bad, 0.0] for name in ("old_logp", "ref_logp", "rollout_logp")}
    for cfg in CONFIGS.values():
        loss, grad, sums = run([-1.0, -2.0], {**given, **unread}, cfg)
        assert (loss, grad.tolist()) == (1.5, [-0.5, -0.5])
        assert all(map(math.isfinite, sums.values()))
        assert sums["importance_capped"] == sums["importance_masked"] == sums["rollouts_masked"] == 0


@pytest.mark.parametrize("bad", NOT_NUMBERS)
def test_what_no_option_reads_may_be_missing(bad):
    """Reference log-probs may be missing without a KL term, and the servers' log-probs without a correction."""
    given = two_tokens(kl_weight=[0.0, 0.0], ref_logp=[bad, bad], rollout_logp=[bad, -1.0])
    loss, grad, _ = run([-1.1, -1.1], given, ObjectiveConfig())
    assert math.isfinite(loss)
    assert grad.isfinite().all()


def test_a_servers_log_prob_that_is_no_number_shows_where_it_is_a_weight():
    _, grad, _ = run(
        [-1.1, -1.1], two_tokens(rollout_logp=[math.nan, -1.0]), ObjectiveConfig(importance=ImportanceConfig(cap=2.0))
    )
    assert math.isnan(grad[0])
