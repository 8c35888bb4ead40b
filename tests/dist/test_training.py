"""The reference swap, refused steps, recomputation and half precision, in one job of two replicas."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest

from tests.support.dist.spawn import run_ranks
from tests.support.dist.training import Session, start
from tests.support.hf_models import make_hf_model

OPTIMIZERS = ("plain", "distributed")


def rank_observe(path: str, root: str) -> dict[str, Any]:
    from megatron_dypo.config.model import ParallelConfig
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.parallel.groups import close

    parallel = ParallelConfig()
    layout = start_megatron(parallel)

    def new(**options: Any) -> Session:
        return start(path, layout, parallel, **options)

    seen: dict[str, Any] = {"recompute": {mode: _train(new(recompute=mode)) for mode in ("none", "selective", "full")}}
    for name in OPTIMIZERS:
        distributed = name == "distributed"
        seen[name] = {
            "swap": _swap(new(distributed=distributed)),
            "uninterrupted": _train(new(distributed=distributed)),
            "overlapped": _train(new(distributed=distributed, overlap_grad_reduce=True)),
            "rewritten": _rewrite(new(distributed=distributed, dtype="bfloat16")) if distributed else None,
            "nan": _train_on_nan(new(distributed=distributed)),
            "bfloat16": _resume(
                functools.partial(new, distributed=distributed, dtype="bfloat16"),
                functools.partial(new, distributed=not distributed, dtype="bfloat16"),
                f"{root}/{name}",
                layout,
            ),
        }
    close(layout)
    return seen


def _train(session: Session) -> Any:
    return session.train(1, 3), session.weights()


def _swap(session: Session) -> dict[str, Any]:
    from megatron_dypo.mcore.reference import ReferencePolicy

    seen: dict[str, Any] = {"initial": session.weights()}
    reference = ReferencePolicy(session.chunks)
    session.train(1, 2)
    seen["trained"] = session.weights()
    with reference.swapped_in():
        seen["inside"] = session.weights()
        session.run(7, forward_only=True)
    seen["after"] = session.weights()
    with pytest.raises(KeyError), reference.swapped_in():
        raise KeyError
    seen["after exception"] = session.weights()
    seen["went on"] = session.train(3, 3), session.weights()
    reference.capture()
    session.train(4, 4)
    with reference.swapped_in():
        seen["captured again"] = session.weights()
    return seen


def _rewrite(session: Session) -> dict[str, Any]:
    from megatron_dypo.mcore.chunks import named_global_parameters
    from megatron_dypo.mcore.reference import ReferencePolicy

    at_rewrite: list[Any] = []
    reference = ReferencePolicy(session.chunks, rewrite=lambda: at_rewrite.append(session.weights()))
    session.train(1, 2)
    seen: dict[str, Any] = {"trained": session.weights(), "at rewrite": at_rewrite}
    with reference.swapped_in():
        assert not at_rewrite
    for _, parameter in named_global_parameters(session.chunks):
        parameter.detach().mul_(1.5)
    seen["spoilt"] = session.weights()
    session.optimizer.rewrite_weights()
    seen["rewritten"] = session.weights()
    return seen


def _train_on_nan(session: Session) -> dict[str, Any]:
    before = session.weights()
    session.optimizer.zero_grad()
    session.run(1)
    next(session.chunks[0].parameters()).main_grad.fill_(math.nan)
    result = session.optimizer.step()
    refused = session.weights()
    return {"ok": result.ok, "norm": result.grad_norm, "before": before, "after": refused, "next": session.train(2, 2)}


def _resume(new: Any, other: Any, root: str, layout: Any) -> Any:
    from megatron_dypo.mcore.checkpoints import checkpoint

    session = new()
    session.train(1, 1)
    kept = {"chunks": session.chunks, "optimizer": session.optimizer, "layout": layout}
    folder = checkpoint.begin_save(root, 1, **kept, trainer_state={}).finish()
    uninterrupted = session.train(2, 3), session.weights()
    session = new()
    checkpoint.load(folder, chunks=session.chunks, optimizer=session.optimizer, layout=layout)
    resumed = session.train(2, 3), session.weights()
    with pytest.raises(
        ValueError, match=r"keep model\.dtype, optimizer\.distributed and optimizer\.algorithm as they were"
    ):
        checkpoint.load(folder, chunks=session.chunks, optimizer=other().optimizer, layout=layout)
    return uninterrupted, resumed


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what the first replica saw; the ranks of the other hold the same weights."""
    folder = tmp_path_factory.mktemp("training")
    path = make_hf_model("qwen3", folder / "hf", num_hidden_layers=2)
    return run_ranks(2, rank_observe, str(path), str(folder / "checkpoints"))[0]


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)


def assert_moved(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert all((ours[name] != theirs[name]).any() for name in ours)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_reference_comes_in_and_the_policy_returns_bit_by_bit(seen, optimizer) -> None:
    swap = seen[optimizer]["swap"]
    assert_moved(swap["trained"], swap["initial"])
    assert_same(swap["inside"], swap["initial"])
    assert_same(swap["after"], swap["trained"])
    assert_same(swap["after exception"], swap["trained"])
    assert_same(swap["captured again"], swap["went on"][1])


def test_weights_come_back_bit_by_bit_from_the_optimizer(seen) -> None:
    rewritten = seen["distributed"]["rewritten"]
    assert_moved({"lm_head.weight": rewritten["spoilt"]["lm_head.weight"]}, rewritten["trained"])
    assert_same(rewritten["rewritten"], rewritten["trained"])


def test_a_swap_ends_with_one_rewrite_when_the_policy_is_back(seen) -> None:
    (weights,) = seen["distributed"]["rewritten"]["at rewrite"]
    assert_same(weights, seen["distributed"]["rewritten"]["trained"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_swap_leaves_no_trace_in_training(seen, optimizer) -> None:
    steps, weights = seen[optimizer]["uninterrupted"]
    assert seen[optimizer]["swap"]["went on"][0] == steps[2:]
    assert_same(seen[optimizer]["swap"]["went on"][1], weights)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_overlapped_reduction_changes_no_update(seen, optimizer) -> None:
    assert seen[optimizer]["overlapped"][0] == seen[optimizer]["uninterrupted"][0]
    assert_same(seen[optimizer]["overlapped"][1], seen[optimizer]["uninterrupted"][1])


def test_the_distributed_optimizer_makes_the_same_updates(seen) -> None:
    (steps, weights), (sharded_steps, sharded) = (seen[name]["uninterrupted"] for name in OPTIMIZERS)
    np.testing.assert_allclose(sharded_steps, steps, rtol=1e-6)
    for name, tensor in weights.items():
        np.testing.assert_allclose(sharded[name], tensor, atol=1e-6, rtol=0, err_msg=name)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_gradient_that_is_not_finite_changes_nothing(seen, optimizer) -> None:
    nan = seen[optimizer]["nan"]
    assert not nan["ok"]
    assert math.isnan(nan["norm"])
    assert_same(nan["after"], nan["before"])
    assert math.isfinite(nan["next"][0][0])


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_changes_no_update(seen, mode) -> None:
    assert seen["recompute"][mode][0] == seen["recompute"]["none"][0]
    assert_same(seen["recompute"][mode][1], seen["recompute"]["none"][1])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_bfloat16_run_equals_the_uninterrupted_one(seen, optimizer) -> None:
    uninterrupted, resumed = seen[optimizer]["bfloat16"]
    assert resumed[0] == uninterrupted[0]
    assert_same(resumed[1], uninterrupted[1])


def test_rates_rise_and_fall_without_a_step_at_zero(seen) -> None:
    rates = [rate for _, rate in seen["plain"]["uninterrupted"][0]]
    assert rates == pytest.approx([0.5e-3, 1e-3, 0.5e-3 * (1 + math.cos(math.pi / 7))])
