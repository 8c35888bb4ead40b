"""The rules by which checkpoints stay, and their removal."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from pathlib import Path

import pytest

from megatron_dypo.config.run import CheckpointConfig, KeepBestConfig
from megatron_dypo.mcore.checkpoints import folder
from megatron_dypo.mcore.checkpoints.prune import kept_by, prune, scores_for

METRIC = "eval/aime/accuracy"
SCORES: dict[int, float | None] = {10: 0.5, 20: None, 30: 0.9, 40: 0.1, 50: 0.9, 60: 0.2}


def publish(root: Path, step: int, cfg: CheckpointConfig, score: object = None) -> None:
    final = folder.folder_of(root, step)
    partial = folder.make_partial(final, ("mcore",))
    (partial / "trainer_state.json").write_text(json.dumps({"trainer": {"scores": {METRIC: score}}}))
    folder.publish(final)
    prune(final, cfg)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def best(mode: str = "max", **more: int) -> CheckpointConfig:
    return CheckpointConfig(keep_best=KeepBestConfig(metric=METRIC, mode=mode), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cfg", "kept"),
    [
        (CheckpointConfig(keep=1), {60: ["last"]}),
        (CheckpointConfig(keep=0), {step: ["last"] for step in SCORES}),
        (CheckpointConfig(keep=1, keep_every=20), {60: ["last", "every"], 40: ["every"], 20: ["every"]}),
        (best(keep=2), {60: ["last"], 50: ["last", "best"]}),
        (best("min", keep=1), {60: ["last"], 40: ["best"]}),
        (best("min", keep=1, keep_every=40), {60: ["last"], 40: ["every", "best"]}),
    ],
)
def test_a_step_stays_by_every_rule_that_names_it(cfg: CheckpointConfig, kept: dict[int, list[str]]) -> None:
    assert kept_by(SCORES, cfg, newest=60) == kept


def test_the_steps_that_led_to_the_one_saved_last_count_as_newer_than_those_that_the_run_went_back_from() -> None:
    assert kept_by(SCORES, CheckpointConfig(keep=2), newest=20) == {20: ["last"], 10: ["last"]}
    assert kept_by(SCORES, CheckpointConfig(keep=3), newest=20) == {20: ["last"], 10: ["last"], 60: ["last"]}


def test_without_a_measured_step_none_is_the_best() -> None:
    assert kept_by({10: None, 20: None}, best(keep=1), newest=20) == {20: ["last"]}


def test_a_run_keeps_the_best_of_all_its_steps(tmp_path: Path) -> None:
    for step, score in SCORES.items():
        publish(tmp_path, step, best(keep=1), score)
    assert names(tmp_path) == ["step_000050", "step_000060"]


@pytest.mark.parametrize("score", [None, "0.9", math.nan, math.inf, [1]])
def test_a_score_that_is_no_number_is_not_the_best(score: object, tmp_path: Path) -> None:
    publish(tmp_path, 10, best(keep=1), 0.1)
    publish(tmp_path, 20, best(keep=1), score)
    publish(tmp_path, 30, best(keep=1), 0.0)
    assert names(tmp_path) == ["step_000010", "step_000030"]


def test_a_checkpoint_keeps_the_metric_that_it_is_compared_by() -> None:
    assert scores_for({METRIC: 0.5, "train/lr": 1.0}, best(), 10) == {METRIC: 0.5}
    assert scores_for({"train/lr": 1.0}, best(), 10) == {}
    assert scores_for({METRIC: 0.5}, CheckpointConfig(), 10) == {}


def test_a_damaged_checkpoint_that_was_set_aside_is_neither_counted_nor_removed(tmp_path: Path) -> None:
    cfg = CheckpointConfig(keep=2)
    for step in (10, 20):
        publish(tmp_path, step, cfg)
    assert folder.set_aside(tmp_path / "step_000020") == tmp_path / "step_000020.damaged"
    for _ in range(2):  # the run reaches the step again, and its checkpoint is damaged again
        publish(tmp_path, 20, cfg)
        assert names(tmp_path)[:2] == ["step_000010", "step_000020"]
        folder.set_aside(tmp_path / "step_000020")
    aside = ["step_000020.damaged", "step_000020.damaged-2", "step_000020.damaged-3"]
    assert names(tmp_path) == ["step_000010", *aside]
    folder.mend_interrupted(tmp_path)
    assert folder.find_latest(tmp_path) == tmp_path / "step_000010"
    assert names(tmp_path) == ["step_000010", *aside]


def test_a_removal_that_was_cut_off_leaves_no_checkpoint_and_is_finished_at_the_next_start(tmp_path: Path) -> None:
    publish(tmp_path, 10, CheckpointConfig())
    publish(tmp_path, 20, CheckpointConfig())
    locked = tmp_path / "step_000020" / "mcore"
    (locked / "tensors").write_text("")
    if os.geteuid() == 0:  # root removes whatever it likes: cut the removal off after the rename
        (tmp_path / "step_000020").rename(tmp_path / "step_000020.deleted")
    else:
        locked.chmod(0o500)
        with pytest.raises(PermissionError):
            folder.discard(tmp_path / "step_000020")
        (tmp_path / "step_000020.deleted" / "mcore").chmod(0o700)
    assert folder.find_latest(tmp_path) == tmp_path / "step_000010"
    assert folder.candidates(tmp_path) == [tmp_path / "step_000010"]
    folder.mend_interrupted(tmp_path)
    assert names(tmp_path) == ["step_000010"]


def test_what_cannot_be_removed_is_named_and_stops_neither_a_save_nor_a_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    publish(tmp_path, 10, CheckpointConfig())
    remove = shutil.rmtree

    def busy(path: Path, *_: object) -> None:
        if "step_000010" in str(path):
            raise OSError(errno.EBUSY, "somebody reads it", str(path))
        remove(path)

    monkeypatch.setattr(shutil, "rmtree", busy)
    for step in (20, 30):
        publish(tmp_path, step, CheckpointConfig(keep=1))
    folder.mend_interrupted(tmp_path)
    assert names(tmp_path) == ["step_000010.deleted", "step_000030"]
    lines = [record.getMessage() for record in caplog.records]
    assert sum("step_000010.deleted cannot be removed, and stays: " in line for line in lines) == 3, (
        "two saves and a start"
    )
    assert folder.candidates(tmp_path) == [tmp_path / "step_000030"]
    monkeypatch.undo()
    folder.mend_interrupted(tmp_path)
    assert names(tmp_path) == ["step_000030"]


def test_a_checkpoint_that_stepped_aside_for_one_that_never_came_is_restored(tmp_path: Path) -> None:
    publish(tmp_path, 10, CheckpointConfig())
    (tmp_path / "step_000010").rename(tmp_path / ".step_000010.replaced")
    folder.mend_interrupted(tmp_path)
    assert names(tmp_path) == ["step_000010"]
    (tmp_path / ".step_000010.replaced").mkdir()
    folder.mend_interrupted(tmp_path)
    assert names(tmp_path) == ["step_000010"]


@pytest.mark.parametrize(("fields", "message"), [({"keep_every": -1}, "keep_every=-1"), ({"keep": -1}, "keep=-1")])
def test_a_negative_number_is_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CheckpointConfig(**fields)  # type: ignore[arg-type]


def test_a_blank_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="metric=' ': must name a metric"):
        KeepBestConfig(metric=" ")
