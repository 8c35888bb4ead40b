"""Weights that an update itself makes not finite, of finite gradients: no server and no checkpoint gets them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from tests.support.dist.multi_step import batch_of, config_of, make_run, put
from tests.support.dist.spawn import run_ranks
from tests.support.hf_models import make_hf_model

READ = "decoder.layers.3.mlp.linear_fc2.weight"
"""A weight of the last layer: with two stages the second rank has it."""
UNREAD = "embedding.word_embeddings.weight"
"""The embedding; the row of its last id, which no sample has, shows in no loss and in no gradient."""
BIAS = "decoder.layers.2.mlp.router.expert_bias"
"""A router bias, which no gradient trains."""
LAYOUTS: list[dict[str, Any]] = [{}, {"pipeline": 2}]


def rank_spoil(
    path: str, folder: str, axes: dict[str, Any], spoilt: dict[int, str], options: dict[str, Any]
) -> dict[str, Any]:
    """Make six updates, two of a batch, with a NaN in a moment of the named weight before each of the ``spoilt`` ones.

    A router bias has no moment: it gets the NaN itself.

    Args:
        options: ``every``, the steps from one checkpoint to the next, and ``on_bad_step``.
    """
    from megatron_dypo.config.model import ParallelConfig
    from megatron_dypo.ending import RunEnded
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.parallel.groups import close
    from tests.support.loop_cases import make_step

    layout = start_megatron(ParallelConfig(**axes))
    config = config_of(path, folder, axes, "exact")
    config = dataclasses.replace(
        config,
        checkpoint=dataclasses.replace(config.checkpoint, every=options["every"]),
        optimizer=dataclasses.replace(config.optimizer, on_bad_step=options["on_bad_step"]),
    )
    run, recorder, policy = make_run(config, layout)
    served: list[tuple[int, str | None]] = []
    refit = recorder.refit

    def watched(version: int) -> Any:
        served.append((version, _bad_weight(policy)))
        return refit(version)

    recorder.refit = watched  # type: ignore[method-assign]
    digests, end = [policy.weights_digest()], None
    try:
        for step in range(6):
            if run.progress.batch.is_used_up:
                put(run, batch_of(step // 2))
            if step + 1 in spoilt:
                _spoil(policy, spoilt[step + 1])
            make_step(run)
            digests.append(policy.weights_digest())
    except RunEnded as ended:
        end = (run.progress.step, ended.cause.label, str(ended))
    close(layout)
    name = "train/rolled_back_to"
    back = {step: found[name] for step, found in recorder.metrics.items() if name in found}
    skipped = [step for step, found in recorder.metrics.items() if found["train/skipped"]]
    return {"served": served, "digests": digests, "end": end, "back": back, "skipped": skipped}


def _spoil(policy: Any, name: str) -> None:
    from megatron_dypo.mcore.chunks import named_global_weights

    weight = dict(named_global_weights(policy.chunks)).get(name)
    if weight is None:
        return  # another stage has it
    if name == BIAS:
        weight[0] = math.nan
        return
    (state,) = [
        state
        for optimizer in policy.optimizer.megatron.chained_optimizers
        for parameter, state in optimizer.optimizer.state.items()
        if parameter is weight
    ]
    state["exp_avg"][-1, 0] = math.nan


def _bad_weight(policy: Any) -> str | None:
    """Return a weight of this rank with a NaN, found one by one."""
    from megatron_dypo.mcore.chunks import named_global_weights

    return next((name for name, weight in named_global_weights(policy.chunks) if weight.isnan().any()), None)


def run_spoilt(
    folder: Path,
    spoilt: dict[int, str],
    axes: dict[str, Any] | None = None,
    *,
    kind: str = "qwen2",
    every: int = 2,
    on_bad_step: str = "stop",
) -> list[dict[str, Any]]:
    path, axes = str(make_hf_model(kind, folder / "hf")), axes or {}
    options = {"every": every, "on_bad_step": on_bad_step}
    ranks = math.prod(axes.values())
    results = run_ranks(ranks, rank_spoil, path, str(folder / "run"), axes, spoilt, options)
    for result in results:
        assert all(bad is None for _, bad in result["served"]), result["served"]
    return results


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "run" / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("name", [READ, UNREAD])
@pytest.mark.parametrize("axes", LAYOUTS, ids=["one process", "two stages"])
def test_a_weight_that_an_update_spoils_ends_the_run_on_all_ranks_before_the_servers_get_it(
    tmp_path: Path, axes: dict[str, Any], name: str
) -> None:
    for result in run_spoilt(tmp_path, {4: name}, axes):
        assert result["end"] == (
            4,
            "not_finite",
            f"step 4, after its update: weight {name} holds a value that is not finite",
        )
        assert [version for version, _ in result["served"]] == [2]
        assert result["skipped"] == [], "its gradients were finite"
    assert saved(tmp_path) == [2]


@pytest.mark.parametrize("axes", LAYOUTS, ids=["one process", "two stages"])
def test_a_run_rolls_back_from_weights_that_an_update_spoilt(tmp_path: Path, axes: dict[str, Any]) -> None:
    for result in run_spoilt(tmp_path, {4: READ}, axes, on_bad_step="roll_back"):
        digests = result["digests"]
        assert result["end"] is None
        assert digests[4] == digests[2] != digests[3], "the weights of the checkpoint of step 2"
        assert len(set(digests)) == 6, "every other update changed them: the moment is the checkpoint's again, too"
        assert [version for version, _ in result["served"]] == [2, 4, 6]
        assert result["back"] in ({4: 2.0}, {})
    assert saved(tmp_path) == [5, 6], "it goes on and saves"


def test_a_run_rolls_back_from_a_weight_that_is_found_before_a_checkpoint(tmp_path: Path) -> None:
    """The third update is the first of its batch, so no refit follows it."""
    (result,) = run_spoilt(tmp_path, {3: UNREAD}, every=1, on_bad_step="roll_back")
    assert result["end"] is None
    assert result["digests"][3] == result["digests"][2]
    assert [version for version, _ in result["served"]] == [2, 3, 4, 6], "the servers get them at once"
    assert result["back"] == {4: 2.0}, "in the record of the next step"
    assert saved(tmp_path) == [5, 6]


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe"])
def test_a_router_bias_that_is_not_finite_is_named_before_the_servers_get_it(tmp_path: Path, kind: str) -> None:
    (result,) = run_spoilt(tmp_path, {2: BIAS}, kind=kind)
    step, label, message = result["end"]
    assert (step, label) == (2, "not_finite")
    assert f"weight {BIAS}" in message
    assert result["served"] == []
    assert saved(tmp_path) == []
