"""Each preset's gradient on every token equals that of the published equation, by autograd in float64."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_dypo.config.presets import PRESETS
from megatron_dypo.objective.recipes.registry import OBJECTIVES, build_objective
from tests.support.rival_cases import config_of, gradients, ragged_cases
from tests.support.rival_equations import chord, token_mean_grpo, token_mean_nll
from tests.support.rival_presets import BUFFER_EQUATIONS, EQUATIONS

OWN = {"sft_then_rl_luffy_paper": {"sft_steps": 3}}
"""Options that a preset leaves to the run."""


K = {"trapo_paper": 8, "trapo_code": 8}
FORCED = {
    "prefix_rft_paper": (0.6,), "prefix_rft_code": (0.6,), "trapo_paper": (0.2, 0.2, 0.5, 1), "trapo_code": (0.3, 1)
}  # fmt: skip
"""Share of forced tokens in each of a group's last rollouts."""


def cases_of(name, seed=0):
    return ragged_cases(seed, k=K.get(name, 4), forced=FORCED.get(name, ()))


def literal(cases, equation):
    """Return the gradients of ``equation`` by log π and by entropy, with the keys of :func:`gradients`."""
    prompts = [
        SimpleNamespace(rollouts=[leaf(r) for r in case.rollouts], trace=case.trace and leaf(case.trace))
        for case in cases
    ]
    equation(prompts).backward()
    leaves = {(i, j): y for i, p in enumerate(prompts) for j, y in enumerate(p.rollouts)}
    leaves |= {(i, "trace"): p.trace for i, p in enumerate(prompts) if p.trace is not None}
    return tuple({key: grad_of(getattr(y, name)) for key, y in leaves.items()} for name in ("logp", "entropy"))


def leaf(response):
    tensors = {name: torch.tensor(getattr(response, name), requires_grad=True) for name in ("logp", "entropy")}
    # π_old is the trainer's: samples carry it in fp32.
    old = torch.tensor(response.old_logp.astype(np.float32).astype(np.float64))
    return SimpleNamespace(**tensors, old=old, reward=response.reward, forced=response.forced)


def grad_of(tensor):
    return tensor.grad.numpy() if tensor.grad is not None else np.zeros(len(tensor))


def compare(mine, expected, rtol=1e-5):
    largest = max(np.abs(values).max() for values in expected.values())
    for key, wanted in expected.items():
        got = mine.get(key, np.zeros_like(wanted))
        np.testing.assert_allclose(got, wanted, rtol=rtol, atol=1e-9 * largest, err_msg=str(key))
    assert mine.keys() <= expected.keys()


def test_every_preset_has_its_equation_and_every_rival_a_preset():
    assert EQUATIONS.keys() == PRESETS.keys()
    assert {preset["name"] for preset in PRESETS.values()} == set(OBJECTIVES) - {
        "dypo",
        "opd",
    }  # opd: test_distillation.py


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_gradient_of_every_token_is_that_of_the_published_equation(name):
    cases = cases_of(name)
    cfg = config_of(preset=name, **OWN.get(name, {}))
    for mine, expected in zip(gradients(cases, cfg, k=K.get(name, 4)), literal(cases, EQUATIONS[name]), strict=True):
        if any(np.abs(values).max() for values in expected.values()):
            compare(mine, expected)
        else:
            assert all(not values.any() for values in mine.values())


@pytest.mark.parametrize("name", EQUATIONS)
def test_replicas_and_microbatches_leave_no_trace_in_the_gradients(name):
    cases, k = [*cases_of(name, 1), *cases_of(name, 2)], K.get(name, 4)
    cfg = config_of(preset=name, **OWN.get(name, {}))
    whole, split = gradients(cases, cfg, k=k), gradients(cases, cfg, k=k, microbatches=5, replicas=2)
    for one, other in zip(whole, split, strict=True):
        compare(other, one, rtol=1e-12)


@pytest.mark.parametrize("name", BUFFER_EQUATIONS)
def test_the_gradient_of_an_update_on_buffered_traces_is_that_of_the_published_equation(name):
    cases = [*ragged_cases(1), *ragged_cases(2), *ragged_cases(3)]
    expected = literal(cases, BUFFER_EQUATIONS[name])
    for split in ({}, {"microbatches": 2, "replicas": 2}):
        for mine, wanted in zip(
            gradients(cases, config_of(preset=name), buffered=True, **split), expected, strict=True
        ):
            assert mine.keys() == {(2, "trace"), (5, "trace"), (8, "trace")}
            compare(mine, wanted)


@pytest.mark.parametrize(("step", "mu"), [(0, 0.9), (50, 0.7755203820042827), (100, 0.475), (200, 0.05), (500, 0.05)])
def test_the_weight_of_chord_follows_its_schedule(step, mu):
    cases = ragged_cases(3)
    mine, _ = gradients(cases, config_of(preset="chord_mu_paper"), step=step)
    compare(mine, literal(cases, chord(mu, False))[0])


def test_a_prompt_without_a_trace_gives_its_rollouts_to_chord():
    cases = ragged_cases(4)
    cases[1] = replace(cases[1], trace=None)
    mine, _ = gradients(cases, config_of(preset="chord_phi_paper"))
    assert (1, "trace") not in mine

    def equation(prompts):
        traces = [p.trace for p in prompts if p.trace is not None]
        supervised = token_mean_nll(traces, lambda y: y.logp.detach().exp() * (1 - y.logp.detach().exp()))
        return 0.9 * token_mean_grpo(prompts) + 0.1 * supervised

    compare(mine, literal(cases, equation)[0])


def test_a_prompt_without_a_trace_gives_luffy_a_group_of_its_rollouts():
    cases = ragged_cases(5)
    cases[1] = replace(cases[1], trace=None)
    mine, _ = gradients(cases, config_of(preset="luffy_paper"))
    alone, _ = gradients([cases[1]], config_of(preset="dr_grpo_luffy_paper", clip_low=None, clip_high=None), k=3)
    for member in range(3):
        np.testing.assert_allclose(3 * mine[1, member], alone[0, member], rtol=1e-6)


@pytest.mark.parametrize("name", ["luffy_paper", "srft_hpt_code", "rl_with_sft_loss_luffy_code"])
def test_a_trace_that_takes_a_place_leaves_two_rollouts_at_least(name):
    objective = build_objective(config_of(preset=name))
    assert objective.num_rollouts(8) == 7
    with pytest.raises(ValueError, match=r"rollout\.group_size=2: must be at least 3"):
        objective.num_rollouts(2)


def test_a_wrong_option_is_named_with_the_nearest_and_a_wrong_value_with_its_rule():
    for options, message in (
        ({"gama": 0.1}, r"objective\.options\.gama: unknown key; did you mean"),
        ({"shape_gamma": 0}, r"objective\.options\.shape_gamma=0.*must be positive"),
        ({"shape_gamma": "x"}, r"objective\.options\.shape_gamma='x': "),
    ):
        with pytest.raises(ValueError, match=message):
            build_objective(config_of(name="luffy", options=options))
    with pytest.raises(ValueError, match=r"objective\.options\.mu\.shap: unknown key; did you mean mu\.shape"):
        build_objective(config_of(name="chord", options={"mu": {"start": 1, "end": 0, "steps": 5, "shap": "linear"}}))
    with pytest.raises(ValueError, match="grpo has none"):
        build_objective(config_of(name="grpo", options={"gamma": 1}))
