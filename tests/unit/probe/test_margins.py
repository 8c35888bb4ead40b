"""η, saturation and margins against a naive sum over pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_dypo.probe.gradients import Setting
from megatron_dypo.probe.margins import estimate_margins
from tests.support.probe_cases import Population, draw_rollouts, naive_gradients, to_scores

POPULATION = Population(lean=6.0)


def draw(seed, prompts=25):
    return draw_rollouts(np.random.default_rng(seed), POPULATION, prompts=prompts, repeats=3, group_size=4)


def estimates(drawn, **changes) -> Any:
    return estimate_margins(to_scores(drawn), Setting(group_size=4, length_normalization="sum", **changes))


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_figures_are_means_over_groups_of_means_over_pairs(beta):
    drawn = draw(0)
    eta, saturated, margin = [], [], []
    for prompt, group in np.ndindex(25, 3):
        correct, ratio = drawn["correct"][prompt, group], drawn["log_ratio"][prompt, group]
        pairs = np.array([s - f for s in ratio[correct] for f in ratio[~correct]])
        if len(pairs):
            eta.append(np.mean((1 / (1 + np.exp(beta * pairs))) ** 2))
            saturated.append(np.mean(np.abs(beta * pairs) > 5))
            margin.append(pairs.mean())
    found = estimates(drawn, beta_gal=beta)["frozen"]
    assert found["eta"].value == pytest.approx(np.mean(eta))
    assert found["saturation"].value == pytest.approx(np.mean(saturated))
    assert found["margin"].value == pytest.approx(np.mean(margin))


def test_against_the_old_policy_eta_is_a_quarter_without_uncertainty():
    found = estimates(draw(1))["old"]
    assert (found["eta"].low, found["eta"].value, found["eta"].high) == (0.25, 0.25, 0.25)
    assert (found["saturation"].value, found["margin"].value) == (0, 0)


def test_intervals_of_eta_cover_the_population():
    naive = naive_gradients(draw(99, 20_000), divide_by_length=False)
    truth = naive["eta"].sum() / naive["is_mid"].sum()
    found = [estimates(draw(seed))["frozen"]["eta"] for seed in range(50)]
    assert np.mean([one.low <= truth <= one.high for one in found]) >= 0.9
