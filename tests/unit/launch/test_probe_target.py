"""The run and the weights that ``megatron-dypo probe`` measures, and the config that it does it with."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dypo.config.reading.load import dump_config
from megatron_dypo.launch.probe_target import probe_target
from tests.support.loop_cases import aime, make_config


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Make a run folder with checkpoints of the steps 3 and 5; that of step 6 is not whole."""
    folder = tmp_path / "a run: 'x'"
    folder.mkdir()
    config = make_config(folder, eval=aime(), rollout={"mode": "async"})
    (folder / "config.yaml").write_text(dump_config(config))
    for step in (3, 5, 6):
        checkpoint = folder / "checkpoints" / f"step_{step:06d}"
        checkpoint.mkdir(parents=True)
        if step < 6:
            (checkpoint / "trainer_state.json").write_text("{}")
    return folder


def test_a_run_stands_for_its_newest_whole_checkpoint(run: Path) -> None:
    target = probe_target(run)
    assert target.checkpoint == run / "checkpoints" / "step_000005"
    assert target.run_dir == run
    assert target.config([]).run.dir == str(run / "probe" / "step_000005")


def test_a_checkpoint_names_its_run_from_anywhere(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = probe_target(run / "checkpoints" / "step_000003")
    assert (target.run_dir, target.checkpoint) == (run, run / "checkpoints" / "step_000003")
    monkeypatch.chdir(run / "checkpoints")
    target = probe_target(Path("step_000003"))
    assert target.run_dir.resolve() == run
    assert target.config([]).run.dir.endswith("probe/step_000003")


def test_the_initial_weights_need_no_checkpoint(run: Path) -> None:
    target = probe_target(run, initial=True)
    assert target.checkpoint is None
    assert target.config([]).run.dir == str(run / "probe" / "step_000000")


def test_the_config_is_the_runs_without_what_a_probe_does_not_do(run: Path) -> None:
    config = probe_target(run).config(["probe.prompts=7"])
    assert config.probe.prompts == 7
    assert config.eval.sets == {}
    assert config.rollout.mode == "sync"
    assert config.rollout.group_size == 2


def test_what_cannot_be_measured_is_refused(run: Path) -> None:
    empty = run.parent / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text((run / "config.yaml").read_text())
    for path, initial, message in (
        (run.parent / "nothing", False, "must be a run folder"),
        (empty, False, "has no whole checkpoint"),
        (run / "checkpoints" / "step_000006", False, "is no whole checkpoint"),
        (run / "checkpoints" / "step_000009", False, "must be a run folder"),
        (run / "checkpoints" / "step_000003", True, "name the run folder"),
    ):
        with pytest.raises(ValueError, match=message):
            probe_target(path, initial=initial)
    with pytest.raises(ValueError, match="a probe writes to the folder of its run"):
        probe_target(run).config(["run.dir=elsewhere"])


def test_a_model_without_a_name_table_is_refused_before_servers_start(run: Path) -> None:
    message = r"^model\.family=bridge: must be auto for megatron-dypo probe, which needs a name table$"
    with pytest.raises(ValueError, match=message):
        probe_target(run).config(["model.family=bridge"])
