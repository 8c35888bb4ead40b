"""Objectives from outside the package, by import path, with a stream, a term of the loss and metrics of their own."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from megatron_dypo.batching.pack import pack
from megatron_dypo.config.objective import ImportanceConfig, ObjectiveConfig
from megatron_dypo.objective.loss import sum_names, token_loss
from megatron_dypo.objective.metrics import SumMetric, sum_metrics
from megatron_dypo.objective.recipes.base import Objective
from megatron_dypo.objective.recipes.registry import build_objective
from megatron_dypo.objective.recipes.sft import Sft
from megatron_dypo.objective.streams import STREAMS, Stream
from tests.support.objective_cases import loss_inputs, random_groups, totals_of

HERE = "tests.unit.objective.test_own_objectives"
SHAPED = "tests.support.throwaway_objective:ShapedTraces"


class Twice(Sft):
    """An objective that declares one of its streams twice."""

    streams = (*STREAMS, Stream(name="advantage"))


class Taken(Sft):
    """An objective that declares a metric of the trainer."""

    metrics = (SumMetric("train/grad_norm", "", "not the optimizer's", of="objective"),)


class TakenSum(Sft):
    """An objective that gives a sum under a name of the loss."""

    def loss_term(self, policy, x):
        return policy.logp.sum() * 0, {"kl": torch.zeros(())}


class Unfinished(Objective):
    """An objective without methods of its own."""


class Elsewhere:
    """A class that is no objective."""


def build(name, **options):
    return build_objective(ObjectiveConfig(name=name, options=options))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "no_such_package.mine:Mine",
            r"cannot import no_such_package\.mine: No module named .*is its folder on PYTHONPATH",
        ),
        (f"{HERE}:Missing", f"module {HERE} has no 'Missing'"),
        (f"{HERE}:Elsewhere", r"Elsewhere must be a subclass of megatron_dypo\.objective\.recipes\.base\.Objective"),
        (f"{HERE}:build", "build must be a subclass"),
        (f"{HERE}:Unfinished", "Unfinished does not define needs_rollouts, token_weights, treat"),
        (f"{HERE}:Twice", "declares advantage twice"),
        (f"{HERE}:Taken", "metrics train/grad_norm are the trainer's own"),
        (f"{HERE}:TakenSum", r"sums \['kl'\] of the objective's own term: the loss has these names already"),
        (f"{HERE}:", "must have the form my_package.module:MyObjective"),
        (":Mine", "must have the form my_package.module:MyObjective"),
    ],
)
def test_an_import_path_that_is_no_objective_is_refused_by_name(name, message):
    with pytest.raises(ValueError, match=message) as refused:
        build(name)
    assert name in str(refused.value) or "own term" in message


def test_a_module_that_fails_while_it_is_imported_is_named_with_its_error(tmp_path, monkeypatch):
    (tmp_path / "breaks_on_import.py").write_text("raise KeyError('unit')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"cannot import breaks_on_import: KeyError: 'unit' \(breaks_on_import.py:1\)"):
        build("breaks_on_import:Mine")


def test_an_objective_may_lie_in_the_folder_where_the_run_is_started(tmp_path, monkeypatch):
    (tmp_path / "lies_here.py").write_text("from megatron_dypo.objective.recipes.sft import Sft as Mine\n")
    monkeypatch.setattr("sys.path", [entry for entry in __import__("sys").path if entry])
    monkeypatch.chdir(tmp_path)
    assert isinstance(build("lies_here:Mine"), Sft)


def test_options_reach_an_objective_of_ones_own_and_the_built_in_ones_refuse_them():
    assert build(SHAPED, gamma=0.25).gamma == 0.25
    with pytest.raises(ValueError, match=r"objective\.options\.gamma=-1: must be a positive number"):
        build(SHAPED, gamma=-1)
    with pytest.raises(ValueError, match=r"objective\.options=\{'gamma': 1\}: dypo has none"):
        build("dypo", gamma=1)


def shaped_inputs(seed=0):
    """Return the loss inputs of a packed batch of traces with the objective's weights, and log-probs."""
    objective, groups = build(SHAPED, gamma=0.2), random_groups(seed, num_hard=3, num_mid=0)
    weights = [objective.token_weights(group, totals_of(groups), 0).weights[0] for group in groups]
    samples = [dataclasses.replace(g[0], weights=w) for g, w in zip(groups, weights, strict=True)]
    packed = pack(samples, range(3), sum(len(s.tokens) for s in samples), streams=objective.streams)
    at = np.flatnonzero(packed.response_T)
    x = loss_inputs(len(at), sequence=packed.sequence_T[at], **{n: v[at] for n, v in packed.streams.items()})
    return objective, np.concatenate([weights[i]["shaped_weight"] for i in range(3)]), x


def test_a_term_of_ones_own_has_its_gradient_on_every_token_and_its_sums():
    objective, weight, x = shaped_inputs()
    logp = np.random.default_rng(1).normal(-2, 1, len(weight))
    logp_N = torch.tensor(logp, requires_grad=True)
    loss, sums = objective.loss(logp_N, torch.zeros_like(logp_N), x)
    loss.backward()
    shape = 0.2 * np.exp(logp) / (np.exp(logp) + 0.2) ** 2
    np.testing.assert_allclose(logp_N.grad, -weight * shape, rtol=1e-6)
    assert float(sums["shape"]) == pytest.approx(shape.sum())
    assert float(sums["objective"]) == pytest.approx(loss.item()) == pytest.approx(-(weight * shape * logp).sum())
    metrics = sum_metrics(objective.metrics, {**{n: float(v) for n, v in sums.items()}, "shaped_traces": 3.0})
    assert metrics["shape/mean"] == pytest.approx(shape.mean())
    assert metrics["shape/traces"] == 3
    assert metrics["train/loss"] == pytest.approx(loss.item())


def test_sums_have_the_same_names_without_tokens():
    objective, weight, x = shaped_inputs()
    _, sums = objective.loss(torch.zeros(len(weight)), torch.zeros(len(weight)), x)
    assert set(sum_names(objective.loss, objective.streams)) == set(sums) >= {"shape", "objective", "tokens"}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_of_ones_own_stream_that_is_no_number_shows_in_the_gradient_of_its_token(bad):
    objective, weight, x = shaped_inputs()
    x.streams["shaped_weight"][1] = bad
    logp_N = torch.full((len(weight),), -1.0, dtype=torch.float64, requires_grad=True)
    objective.loss(logp_N, torch.zeros_like(logp_N), x)[0].backward()
    assert [bool(value) for value in logp_N.grad.isnan()] == [i == 1 for i in range(len(weight))]


def test_a_term_sees_which_tokens_are_masked():
    seen = []

    def term(policy, x):
        seen.append((policy.is_kept.tolist(), policy.logp.tolist(), policy.sequences.mean(x["mine"]).tolist()))
        return policy.logp.sum(), {"mine": x["mine"].sum()}

    x = loss_inputs(3, sequence=[0, 1, 1], rollout_logp=[-9.0, 0.0, 0.0], mine=[4.0, 1.0, 2.0])
    logp_N = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    cfg = ObjectiveConfig(importance=ImportanceConfig(token_bounds=(0.5, 2.0)))
    loss, sums = token_loss(logp_N, torch.zeros(3), x, cfg, term=term)
    loss.backward()
    assert seen == [([False, True, True], [0.0, 0.0, 0.0], [4.0, 1.5, 1.5])]
    assert logp_N.grad.tolist() == [0.0, 1.0, 1.0]
    assert float(sums["mine"]) == 7


def test_a_metric_is_left_out_of_a_step_that_has_nothing_to_divide_by():
    metrics = (
        SumMetric("a", "", "m", of="x", per="n"),
        SumMetric("b", "", "m", of="x", where="n"),
        SumMetric("c", "", "m", of="x"),
        SumMetric("d", "", "m", of="absent"),
    )
    assert sum_metrics(metrics, {"x": 3.0, "n": 2.0}) == {"a": 1.5, "b": 3.0, "c": 3.0}
    assert sum_metrics(metrics, {"x": 3.0, "n": 0.0}) == {"c": 3.0}
