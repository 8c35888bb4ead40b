"""Megatron's own options in a model that trains on two replicas, and parameters that are gathered late."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.dist.spawn import run_ranks
from tests.support.dist.training import Session, start
from tests.support.hf_models import make_hf_model

MODEL = {"attention_softmax_in_fp32": False, "clone_scatter_output_in_embedding": False}
PARALLEL = {"bucket_size": 5000, "pad_buckets_for_high_nccl_busbw": True}
OPTIMIZER = {"log_num_zeros_in_grad": True, "muon_num_ns_steps": 7}


def rank_train(path: str, root: str) -> dict[str, Any]:
    from megatron_dypo.config.model import ParallelConfig
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.parallel.groups import close

    layout = start_megatron(ParallelConfig())
    parallel = ParallelConfig(megatron={"bucket_size": 5000})  # several buckets, so that some are gathered late
    late: dict[str, Any] = {"distributed": True, "overlap_grad_reduce": True}

    def new(**options: Any) -> Session:
        return start(path, layout, parallel, dtype="bfloat16", **late, **options)

    seen: dict[str, Any] = {
        "at once": _observe(new(), layout, f"{root}/at_once"),
        "late": _observe(new(overlap_param_gather=True), layout, f"{root}/late"),
    }
    session = start(path, layout, ParallelConfig(megatron=PARALLEL), megatron=MODEL, **late, **_OPTIONS)
    seen["set"] = _settings(session)
    close(layout)
    return seen


_OPTIONS: dict[str, Any] = {"overlap_param_gather": True, "megatron_of_optimizer": OPTIMIZER}


def _settings(session: Session) -> dict[str, Any]:
    from megatron_dypo.mcore.chunks import unwrap

    model: Any = unwrap(session.chunks[0])
    config = model.decoder.layers[0].config
    assert config is model.config
    ddp, optimizer = session.chunks[0].ddp_config, session.optimizer.megatron.chained_optimizers[0].config
    session.train(1, 1)
    return {
        "model": {name: getattr(config, name) for name in MODEL},
        "parallel": {name: getattr(ddp, name) for name in PARALLEL},
        "optimizer": {name: getattr(optimizer, name) for name in OPTIMIZER},
        "overlap": (ddp.overlap_param_gather, optimizer.overlap_param_gather),
        "buckets": len(session.chunks[0].bucket_groups),
    }


def _observe(session: Session, layout: Any, root: str) -> dict[str, Any]:
    """Read the weights by every way right after an update, when some are still being gathered."""
    from megatron_dypo.mcore.checkpoints import checkpoint
    from megatron_dypo.mcore.reference import ReferencePolicy

    steps = session.train(1, 1)
    waiting = [_is_waiting(session)]
    weights = [_parameters(session)]
    waiting.append(_is_waiting(session))
    steps += session.train(2, 2)
    reference = ReferencePolicy(session.chunks)
    steps += session.train(3, 3)
    with reference.swapped_in():
        weights.append(_parameters(session))
        session.run(7, forward_only=True)
    weights.append(_parameters(session))
    steps += session.train(4, 4)
    reference.capture()
    steps += session.train(5, 5)
    kept = {"chunks": session.chunks, "optimizer": session.optimizer, "layout": layout}
    folder = checkpoint.begin_save(root, 5, **kept, trainer_state={}).finish()
    with reference.swapped_in():
        weights.append(_parameters(session))
    steps += session.train(6, 6)
    checkpoint.load(folder, **kept)
    weights.append(_parameters(session))
    steps += session.train(6, 7)
    return {"steps": steps, "weights": [*weights, _parameters(session)], "waiting": waiting}


def _parameters(session: Session) -> dict[str, np.ndarray]:
    from megatron_dypo.mcore.chunks import named_global_parameters

    return {name: one.detach().float().numpy().copy() for name, one in named_global_parameters(session.chunks)}


def _is_waiting(session: Session) -> bool:
    return any(group.param_gather_handle is not None for group in session.chunks[0].bucket_groups)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("options")
    path = make_hf_model("qwen3", folder / "hf", num_hidden_layers=2)
    first, second = run_ranks(2, rank_train, str(path), str(folder / "checkpoints"))
    for mine, others in zip(first["late"]["weights"], second["late"]["weights"], strict=True):
        _assert_same(mine, others)
    return first


def _assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)


def test_options_of_the_three_mappings_reach_model_buffers_and_optimizer(seen) -> None:
    assert seen["set"]["model"] == MODEL
    assert seen["set"]["parallel"] == PARALLEL
    assert seen["set"]["optimizer"] == OPTIMIZER
    assert seen["set"]["overlap"] == (True, True)
    assert seen["set"]["buckets"] > 1, "bucket_size reached the buffers"


def test_parameters_that_are_gathered_late_are_whole_for_every_reader(seen) -> None:
    assert seen["late"]["waiting"] == [True, False], "a gather waits after the step, and none after a reading"
    assert seen["at once"]["waiting"] == [False, False]
    assert seen["late"]["steps"] == seen["at once"]["steps"]
    assert seen["late"]["steps"][5] == seen["late"]["steps"][6], (
        "the sixth update, again after the checkpoint was loaded"
    )
    for ours, theirs in zip(seen["late"]["weights"], seen["at once"]["weights"], strict=True):
        _assert_same(ours, theirs)
