import math

import pytest
import torch

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.objective.loss import token_loss
from tests.support.objective_cases import loss_inputs


def run(logp, cfg=None, **streams):
    """Return loss, gradient and named sums of one sequence's tokens; streams that are not given are zero."""
    logp_N = torch.tensor(logp, dtype=torch.float64, requires_grad=True)
    loss, sums = token_loss(
        logp_N, torch.zeros_like(logp_N), loss_inputs(len(logp), **streams), cfg or ObjectiveConfig()
    )
    loss.backward()
    return loss.item(), logp_N.grad, {name: float(value) for name, value in sums.items()}


def test_on_policy_surrogate_has_the_policy_gradient():
    _, grad, _ = run([-1.0, -2.0], old_logp=[-1.0, -2.0], advantage=[2.0, -3.0], pg_weight=[0.5, 0.25])
    assert grad.tolist() == pytest.approx([-0.5 * 2.0, 0.25 * 3.0])


@pytest.mark.parametrize(
    ("ratio", "advantage", "has_gradient"),
    [(1.5, 1.0, False), (1.5, -1.0, True), (0.5, 1.0, True), (0.5, -1.0, False), (1.25, 1.0, True)],
)
def test_asymmetric_clip_stops_the_gradient_only_where_the_ratio_went_too_far(ratio, advantage, has_gradient):
    cfg = ObjectiveConfig(clip_low=0.2, clip_high=0.3)
    _, grad, sums = run([math.log(ratio)], cfg, advantage=[advantage], pg_weight=[1.0])
    assert bool(grad[0] != 0) == has_gradient
    assert sums["clipped"] == (0 if has_gradient else 1)


def test_dual_clip_bounds_a_negative_advantage():
    cfg = ObjectiveConfig(dual_clip=3.0)
    loss, grad, sums = run([math.log(10.0)], cfg, advantage=[-1.0], pg_weight=[1.0])
    assert (loss, grad.item(), sums["clipped"]) == (3.0, 0.0, 1.0)
    loss, grad, _ = run([math.log(2.0)], cfg, advantage=[-1.0], pg_weight=[1.0])
    assert loss == pytest.approx(2.0)
    assert grad.item() != 0


def test_k3_is_zero_at_the_reference_and_positive_elsewhere():
    loss, grad, _ = run([-1.0], ref_logp=[-1.0], kl_weight=[1.0])
    assert (loss, grad.item()) == (0.0, 0.0)
    loss, grad, _ = run([-1.0], ref_logp=[-0.5], kl_weight=[2.0])
    assert loss == pytest.approx(2 * (math.exp(0.5) - 0.5 - 1))
    assert grad.item() == pytest.approx(2 * (1 - math.exp(0.5)))


def test_traces_enter_by_their_likelihood_alone():
    loss, grad, sums = run([-1.0, -3.0], nll_weight=[0.5, 0.5], is_trace=[1.0, 1.0], old_logp=[9.0, 9.0])
    assert loss == 2.0
    assert grad.tolist() == [-0.5, -0.5]
    assert (sums["sft"], sums["trace_nll"], sums["rollout_tokens"], sums["ppo_kl"]) == (2.0, 4.0, 0.0, 0.0)
