import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dypo.objective.advantage import group_advantages
from megatron_dypo.objective.gal import gal_coefficients, gal_statistics


@st.composite
def groups(draw):
    """Draw (log-ratios [G], successes [G], β) with any mix of successes and failures."""
    size = draw(st.integers(2, 12))
    ratios = draw(st.lists(st.floats(-200, 200), min_size=size, max_size=size))
    success = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    beta = draw(st.floats(0.01, 10))
    return torch.tensor(ratios, dtype=torch.float64), torch.tensor(success), beta


def literal_loss(log_ratio_G, success_G, beta):
    """Compute eq. 14 and 15 as written: a loop over every pair."""
    pairs = [
        -torch.nn.functional.logsigmoid(beta * (log_ratio_G[s] - log_ratio_G[f]))
        for s in range(len(success_G))
        for f in range(len(success_G))
        if success_G[s] and not success_G[f]
    ]
    return sum(pairs) / len(pairs) if pairs else log_ratio_G.sum() * 0


@given(groups())
@settings(max_examples=300, deadline=None)
def test_coefficients_are_the_gradient_of_the_literal_loss(case):
    log_ratio_G, success_G, beta = case
    variable_G = log_ratio_G.clone().requires_grad_()
    literal_loss(variable_G, success_G, beta).backward()
    torch.testing.assert_close(gal_coefficients(log_ratio_G, success_G, beta), variable_G.grad, rtol=1e-9, atol=1e-12)


@given(groups())
@settings(max_examples=300, deadline=None)
def test_coefficients_sum_to_zero_have_signs_and_are_bounded_by_beta(case):
    log_ratio_G, success_G, beta = case
    coef_G = gal_coefficients(log_ratio_G, success_G, beta)
    assert abs(coef_G.sum().item()) <= 1e-12 * max(beta, 1)
    assert (coef_G[success_G] <= 0).all()
    assert (coef_G[~success_G] >= 0).all()
    assert coef_G[success_G].abs().sum().item() <= beta * (1 + 1e-12)
    margins = log_ratio_G[success_G][:, None] - log_ratio_G[~success_G][None, :]
    if margins.numel():
        expected = beta * torch.sigmoid(-beta * margins).mean().item()
        assert coef_G[success_G].abs().sum().item() == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_coefficients_carry_no_gradient():
    log_ratio_G = torch.zeros(3, requires_grad=True)
    assert not gal_coefficients(log_ratio_G, torch.tensor([True, False, False]), 1.0).requires_grad


@pytest.mark.parametrize("success", [[True, True], [False, False]])
def test_group_without_a_pair_has_no_signal(success):
    ratios, success_G = torch.tensor([1.0, -1.0]), torch.tensor(success)
    assert torch.equal(gal_coefficients(ratios, success_G, 1.0), torch.zeros(2))
    assert gal_statistics(ratios, success_G, 1.0) is None


def test_at_the_reference_eta_is_a_quarter_and_the_loss_is_log_two():
    statistics = gal_statistics(torch.zeros(5), torch.tensor([1, 1, 0, 0, 0]).bool(), 2.0)
    assert statistics.eta == pytest.approx(0.25)
    assert statistics.loss == pytest.approx(math.log(2))
    assert (statistics.saturation, statistics.margin) == (0, 0)


def test_settled_pairs_are_saturated():
    statistics = gal_statistics(torch.tensor([40.0, -40.0]), torch.tensor([True, False]), 1.0)
    assert statistics.saturation == 1
    assert statistics.eta == pytest.approx(0, abs=1e-12)


def test_bad_shapes_and_beta_are_refused():
    with pytest.raises(ValueError, match=r"must both be \[G\]"):
        gal_coefficients(torch.zeros(3), torch.zeros(2), 1.0)
    with pytest.raises(ValueError, match=r"beta=0\.0: must be positive"):
        gal_coefficients(torch.zeros(2), torch.tensor([True, False]), 0.0)


@pytest.mark.parametrize("successes", range(1, 8))
def test_at_the_reference_gal_is_grpo_times_a_number_of_at_least_beta(successes):
    """docs/results_explained.md: β·k/(2·√(|S||F|)), times √(k/(k−1)) for the sample standard deviation."""
    size, beta = 8, 1.0
    reward_G = (torch.arange(size) < successes).double()
    grpo_G = -group_advantages(reward_G, epsilon=1e-12) / size
    gal_G = gal_coefficients(torch.zeros(size).double(), reward_G.bool(), beta)
    factor = beta * size / (2 * math.sqrt(successes * (size - successes))) * math.sqrt(size / (size - 1))
    assert factor > beta
    torch.testing.assert_close(gal_G, factor * grpo_G)
