"""The start of a run: its folder, and whether it asks servers."""

from __future__ import annotations

import dataclasses
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_dypo.config.data import DataConfig
from megatron_dypo.config.evaluation import EvalConfig, EvalSetConfig
from megatron_dypo.config.model import ModelConfig
from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.config.probe import ProbeConfig
from megatron_dypo.config.run import RunConfig
from megatron_dypo.config.tree import Config
from megatron_dypo.objective.recipes.registry import build_objective
from megatron_dypo.rollout.server.servers import ServerPool


def config(objective: ObjectiveConfig, *, sets: tuple[str, ...] = ()) -> Config:
    return Config(
        run=RunConfig(steps=10),
        model=ModelConfig(hf_path="m"),
        data=DataConfig(prompts=("p",)),
        objective=objective,
        eval=EvalConfig(sets={name: EvalSetConfig(path=f"{name}.jsonl") for name in sets}),
    )


def test_servers_start_only_where_a_step_that_is_left_asks_one() -> None:
    from megatron_dypo.loop.setup.build import uses_servers

    sft, both = ObjectiveConfig(name="sft"), ObjectiveConfig(name="sft_then_rl", sft_steps=4)
    assert not uses_servers(config(sft), build_objective(sft), 0)
    assert uses_servers(config(sft, sets=("e",)), build_objective(sft), 0)
    probed = dataclasses.replace(config(sft), probe=ProbeConfig(every=5))
    assert uses_servers(probed, build_objective(sft), 0)
    assert uses_servers(config(both), build_objective(both), 0)
    assert not uses_servers(config(both), build_objective(both), 10)


def test_a_start_says_that_the_memory_of_a_model_without_a_name_table_is_not_checked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from megatron_dypo.loop.setup.build import _check_memory
    from megatron_dypo.parallel.mesh import Mesh
    from megatron_dypo.parallel.position import Position

    bridged = dataclasses.replace(config(ObjectiveConfig()), model=ModelConfig(hf_path="m", family="bridge"))
    said = "run.check_memory=true: nothing is checked with model.family=bridge"
    for rank, has_gpu, count in ((0, True, 1), (1, True, 0), (0, False, 0)):
        caplog.clear()
        memory, capability = (1, (9, 0)) if has_gpu else (None, None)
        with caplog.at_level(logging.WARNING):
            _check_memory(bridged, memory, capability, Position(mesh=Mesh(data=2), rank=rank), fused=True)
        assert [record.getMessage().startswith(said) for record in caplog.records] == [True] * count


def test_fewer_steps_than_are_done_are_refused_and_no_refused_start_rewrites_the_config(tmp_path: Path) -> None:
    from megatron_dypo.loop.setup.run_folder import prepare_folder
    from megatron_dypo.mcore.checkpoints.verify import ALONE

    folder = tmp_path / "checkpoints" / "step_000003"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    (tmp_path / "config.yaml").write_text("run: {steps: 3}\n")

    def start(steps: int) -> Path | None:
        run = RunConfig(dir=str(tmp_path), steps=steps)
        model, data = ModelConfig(hf_path="m"), DataConfig(prompts=("p",))
        return prepare_folder(Config(run=run, model=model, data=data), ALONE)

    with pytest.raises(ValueError, match=r"run\.steps=2: is below the 3 steps done in .*step_000003"):
        start(2)
    assert start(3) == folder
    assert (tmp_path / "config.yaml").read_text() == "run: {steps: 3}\n"
    (tmp_path / "config.yaml").write_text("[")
    assert start(4) == folder


def test_a_rank_that_waits_for_servers_shows_life_until_they_have_started_or_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The deadline of servers that start may be as long as run.watchdog_s, or longer."""
    from megatron_dypo.loop.setup import connect
    from megatron_dypo.processes import watchdog
    from megatron_dypo.rollout.server.servers import NotHealthyError

    monkeypatch.setattr(connect, "_SIGN_OF_LIFE_S", 0.01)
    monkeypatch.setattr(watchdog, "WORK", watchdog.Work())
    starting: Future[ServerPool] = Future()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(connect.await_servers, starting)
        deadline = time.monotonic() + 60
        while watchdog.WORK.marks < 20:
            assert time.monotonic() < deadline
            assert not waiting.done()
        assert watchdog.WORK.pace.part == "waiting for the servers"
        starting.set_exception(NotHealthyError("not healthy after 300 s"))
        with pytest.raises(NotHealthyError, match="not healthy after 300 s"):
            waiting.result()
    assert connect.await_servers(None) is None
