"""Several updates from one rollout batch: the gradient of each against the literal objective at its weights."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.types import Treatment
from tests.support.dist.literal_objective import literal_loss, log_ratios, response_logp
from tests.support.dist.multi_step import MODES, PROMPTS, config_of, rank_train
from tests.support.dist.spawn import run_ranks
from tests.support.hf_models import import_transformers, make_hf_model
from tests.support.slow import slow_unless

LAYOUTS = {"one process": (1, {}), "pp2": (2, {"pipeline": 2}), "dp2": (2, {})}
CASES = slow_unless(lambda layout: layout != "one process", LAYOUTS)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tmp_path_factory.mktemp("multi_step")


@functools.cache
def trained(layout: str, root: Any) -> dict[str, Any]:
    """Train, and join the results of all ranks."""
    path = make_hf_model("qwen3", root / "model", num_hidden_layers=2)
    world_size, axes = LAYOUTS[layout]
    ranks = run_ranks(world_size, rank_train, str(path), str(root / layout.replace(" ", "_")), axes)
    seen: dict[str, Any] = {"resumed": [rank["resumed"] for rank in ranks]}
    for name in (*MODES, "rollout", "older", "epochs", "refreshed"):
        runs = [rank[name] for rank in ranks]
        seen[name] = {
            "steps": [
                {key: {k: v for r in runs for k, v in r["steps"][i][key].items()} for key in ("weights", "grads")}
                for i in range(4)
            ],
            "groups": sorted((g for r in runs for g in r["groups"]), key=lambda g: g[0].order),
            "refitted": runs[0]["refitted"],
            "metrics": runs[0]["metrics"],
        }
    return seen


def model_at(weights: dict[str, np.ndarray], root: Any) -> Any:
    model = import_transformers().AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float64)
    model.load_state_dict({name: torch.tensor(w, dtype=torch.float64) for name, w in weights.items()})
    return model


def gradient_error(ours: dict[str, np.ndarray], model: Any, groups: Any, cfg: ObjectiveConfig) -> float:
    model.zero_grad()
    literal_loss(model, groups, cfg).backward()
    pairs = [(ours[name], p.grad.numpy()) for name, p in model.named_parameters()]
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs)


def literal_drift(model: Any, groups: Any) -> float:
    """Return the mean |ℓ − ℓ_old| of the rollouts, each ℓ divided by the trajectory's length."""
    moves = []
    for group in (g for g in groups if g[0].treatment is Treatment.REINFORCE):
        lengths = [s.num_response_tokens for s in group]
        old = [torch.tensor(s.old_logp.astype("float64")) for s in group]
        now = [response_logp(model, s).detach() for s in group]
        pairs = zip(log_ratios(group, now, lengths), log_ratios(group, old, lengths), strict=True)
        moves += [abs(a - b).item() for a, b in pairs]
    return float(np.mean(moves))


@pytest.mark.parametrize("layout", CASES)
@pytest.mark.parametrize("mode", MODES)
def test_each_update_has_the_gradient_of_the_literal_loss_at_its_own_weights(mode, layout, root) -> None:
    seen, cfg = trained(layout, root)[mode], config_of("m", "d", {}, mode).objective
    for i, step in enumerate(seen["steps"]):
        groups, model = seen["groups"][PROMPTS * i : PROMPTS * (i + 1)], model_at(step["weights"], root)
        assert gradient_error(step["grads"], model, groups, cfg) <= 1e-5, f"step {i}"
        if i % 2 == 1 and layout == "one process":
            other = dataclasses.replace(cfg, gal_coefficients="stale" if mode == "exact" else "exact")
            assert gradient_error(step["grads"], model, groups, other) > 1e-3


@pytest.mark.parametrize("layout", CASES)
@pytest.mark.parametrize("mode", ["exact", "refreshed"])
def test_log_probs_of_old_policy_and_reference_are_those_of_their_weights_in_every_batch(mode, layout, root) -> None:
    seen = trained(layout, root)[mode]
    for batch in (0, 1):
        old = model_at(seen["steps"][2 * batch]["weights"], root)
        reference = old if mode == "refreshed" else model_at(seen["steps"][0]["weights"], root)
        groups = seen["groups"][2 * PROMPTS * batch : 2 * PROMPTS * (batch + 1)]
        rollouts = [s for g in groups for s in g if s.treatment is Treatment.REINFORCE]
        assert rollouts
        for sample in rollouts:
            for model, ours in ((old, sample.old_logp), (reference, sample.ref_logp)):
                np.testing.assert_allclose(ours, response_logp(model, sample).detach().numpy(), atol=2e-5, rtol=0)
    moved = [np.abs(s.old_logp - s.ref_logp).max() for s in rollouts]
    assert max(moved) > 1e-3 if mode == "exact" else max(moved) == 0, (
        "after two updates the frozen reference is another"
    )


@pytest.mark.parametrize("layout", CASES)
def test_rollouts_of_older_weights_get_coefficients_of_the_weights_that_learn_from_them(layout, root) -> None:
    seen = trained(layout, root)["older"]
    exact, stale = (config_of("m", "d", {}, mode).objective for mode in ("exact", "stale"))
    first = seen["steps"][2]  # of the second batch: weights of version 1 sampled it, weights of version 2 learn from it
    groups, model = seen["groups"][2 * PROMPTS : 3 * PROMPTS], model_at(first["weights"], root)
    assert all((s.old_logp == s.rollout_logp).all() for g in groups for s in g if s.treatment is Treatment.REINFORCE)
    assert gradient_error(first["grads"], model, groups, exact) <= 1e-5
    assert gradient_error(first["grads"], model, groups, stale) > 1e-3


@pytest.mark.parametrize("layout", CASES)
def test_a_second_epoch_goes_over_the_same_mini_batches_at_its_own_weights(layout, root) -> None:
    seen, cfg = trained(layout, root)["epochs"], config_of("m", "d", {}, "exact", epochs=2).objective
    assert len(seen["groups"]) == 2 * PROMPTS
    for i, step in enumerate(seen["steps"]):
        first = PROMPTS * (i % 2)
        groups, model = seen["groups"][first : first + PROMPTS], model_at(step["weights"], root)
        assert gradient_error(step["grads"], model, groups, cfg) <= 1e-5, f"step {i}"
    assert seen["refitted"] == [4]
    assert [seen["metrics"][step]["train/staleness"] for step in (1, 2, 3, 4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("mode", MODES)
def test_gals_drift_is_what_stale_coefficients_ignore(mode, root) -> None:
    seen = trained("pp2", root)[mode]
    for i, step in enumerate(seen["steps"]):
        groups = seen["groups"][PROMPTS * i : PROMPTS * (i + 1)]
        expected = literal_drift(model_at(step["weights"], root), groups)
        assert seen["metrics"][i + 1]["gal/drift"] == pytest.approx(expected, rel=1e-3, abs=2e-6)
        assert expected > 1e-2 if i % 2 == 1 else expected < 2e-6


@pytest.mark.parametrize("layout", CASES)
def test_the_servers_get_the_weights_after_the_last_update_of_a_batch(layout, root) -> None:
    for mode in MODES:
        assert trained(layout, root)[mode]["refitted"] == [2, 4]
        staleness = [trained(layout, root)[mode]["metrics"][step]["train/staleness"] for step in (1, 2, 3, 4)]
        assert staleness == [0, 1, 0, 1]


@pytest.mark.parametrize("layout", CASES)
def test_a_run_stopped_inside_a_batch_goes_on_with_its_next_mini_batch(layout, root) -> None:
    for (uninterrupted, resumed), refitted in trained(layout, root)["resumed"]:
        assert refitted == [2]
        assert uninterrupted.keys() == resumed.keys()
        for name, tensor in uninterrupted.items():
            np.testing.assert_array_equal(resumed[name], tensor, err_msg=name)


@pytest.mark.parametrize("layout", CASES)
def test_the_servers_log_probs_can_stand_for_pi_old_and_their_error_is_measured(layout, root) -> None:
    seen = trained(layout, root)["rollout"]
    rollouts = [s for g in seen["groups"] for s in g if s.treatment is Treatment.REINFORCE]
    assert all((s.old_logp == s.rollout_logp).all() for s in rollouts)
    model = model_at(seen["steps"][0]["weights"], root)
    replicas = 2 if layout == "dp2" else 1
    checked = [s for g in seen["groups"][2 : 2 + replicas] for s in g]  # the oldest group of each; 0 and 1 are traces
    errors = [response_logp(model, s).detach().numpy() - s.rollout_logp for s in checked]
    metrics = seen["metrics"]
    name = "old_logp/server_error/"
    assert metrics[1][name + "mean"] == pytest.approx(np.abs(np.concatenate(errors)).mean(), rel=1e-5)
    assert metrics[1][name + "max"] == pytest.approx(np.abs(np.concatenate(errors)).max(), rel=1e-5)
    assert metrics[1][name + "sequence"] == pytest.approx(np.mean([abs(e.sum()) for e in errors]), rel=1e-5)
    assert not any(key.startswith(name) for step in (2, 3, 4) for key in metrics[step])  # every second batch has none
    assert not any("train_rollout_logprob" in key for key in metrics[1])
    for i in (0, 1):
        step, groups = seen["steps"][i], seen["groups"][PROMPTS * i : PROMPTS * (i + 1)]
        cfg = config_of("m", "d", {}, "stale" if i == 0 else "exact").objective
        assert gradient_error(step["grads"], model_at(step["weights"], root), groups, cfg) <= 1e-5
