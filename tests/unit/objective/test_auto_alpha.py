"""α from measured variances: the minimum, its bounds, smoothing, and the way into the objective."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_dypo.config.objective import AutoAlphaConfig, ObjectiveConfig
from megatron_dypo.config.tree import Config
from megatron_dypo.objective.auto_alpha import GradientMoments
from megatron_dypo.objective.recipes.registry import build_objective
from tests.support.loop_cases import make_config
from tests.support.objective_cases import random_groups, totals_of

WIDE = AutoAlphaConfig(low=0.0, high=1.0)


@pytest.mark.parametrize("seed", range(5))
def test_alpha_is_where_the_variance_of_the_mix_is_least(seed: int) -> None:
    root = np.random.default_rng(seed).normal(size=(2, 2))
    (grpo, covariance), (_, gal) = root @ root.T
    grid = np.linspace(0, 1, 10_001)
    variance = grid**2 * grpo + (1 - grid) ** 2 * gal + 2 * grid * (1 - grid) * covariance
    moments = GradientMoments(grpo=grpo, gal=gal, covariance=covariance)
    assert moments.alpha(WIDE) == pytest.approx(grid[variance.argmin()], abs=1e-4)
    assert moments.alpha(AutoAlphaConfig(low=0.5, high=0.5)) == 0.5


def test_estimates_that_no_variance_can_have_give_the_middle_of_the_bounds() -> None:
    flat = GradientMoments(grpo=1.0, gal=1.0, covariance=1.0)
    assert flat.alpha(AutoAlphaConfig(low=0.2, high=0.6, start=0.3)) == pytest.approx(0.4)


def test_smoothing_weighs_the_earlier_estimates_and_survives_a_checkpoint() -> None:
    old, new = GradientMoments(grpo=4.0, gal=0.0, covariance=-1.0), GradientMoments(grpo=0.0, gal=8.0, covariance=1.0)
    assert new.mixed_into(None, 0.9) == new
    mixed = new.mixed_into(old, 0.75)
    assert mixed == GradientMoments(grpo=3.0, gal=2.0, covariance=-0.5)
    assert GradientMoments.from_json(json.loads(json.dumps(mixed.as_json()))) == mixed
    assert GradientMoments.from_json(None) is None


def test_an_objective_with_another_alpha_has_the_weights_of_that_alpha() -> None:
    groups = random_groups(3)
    automatic = build_objective(ObjectiveConfig(alpha="auto", auto_alpha=AutoAlphaConfig(start=0.25)))
    for alpha, objective in ((0.25, automatic), (0.8, automatic.with_alpha(0.8))):
        fixed = build_objective(ObjectiveConfig(alpha=alpha))
        for group in groups:
            ours, theirs = (o.token_weights(group, totals_of(groups), 0).weights for o in (objective, fixed))
            assert ours == theirs
    assert automatic.needs_reference()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"low": 0.6, "high": 0.4}, r"low=0.6, high=0.4: must be 0 <= low <= high <= 1"),
        ({"start": 0.95}, r"start=0.95: must be from low to high"),
        ({"smoothing": 1.0}, r"smoothing=1.0: must be in \[0, 1\)"),
        ({"high": float("nan")}, r"high=nan: must be finite"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoAlphaConfig(**values)


def test_it_needs_a_probe(tmp_path) -> None:
    config = make_config(tmp_path)
    parts = {name: getattr(config, name) for name in ("run", "model", "data", "rollout", "batching")}
    with pytest.raises(ValueError, match=r"objective.alpha=auto: needs probe.every"):
        Config(**parts, objective=ObjectiveConfig(alpha="auto"))
