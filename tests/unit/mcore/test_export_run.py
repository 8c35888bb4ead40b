"""The choice of the checkpoint of a run to export, and of the folder."""

from __future__ import annotations

import filecmp
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dypo.eval.model import hf_folder_of
from megatron_dypo.mcore.checkpoints.convert import hf_to_mcore
from megatron_dypo.mcore.checkpoints.export_run import export_run, whole_checkpoints
from megatron_dypo.parallel.mesh import Mesh
from tests.support.hf_models import make_hf_model

STEPS = (100, 200, 1_000_000)


def models(root: Path) -> dict[int, Path]:
    return {step: root / f"model_{step}" for step in STEPS}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a folder with a model for each step, and a run with checkpoints of these models."""
    root = tmp_path_factory.mktemp("run")
    for seed, (step, model) in enumerate(models(root).items()):
        make_hf_model("qwen2", model, seed=seed, num_hidden_layers=1)
        checkpoint = root / "run" / "checkpoints" / f"step_{step:06d}"
        hf_to_mcore(model, checkpoint / "mcore", mesh=Mesh(), show_progress=False)
        (checkpoint / "trainer_state.json").write_text("{}")
    return root


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original / "run", tmp_path / "run"))


def holds(folder: Path, model: Path) -> bool:
    return filecmp.cmp(folder / "model.safetensors", model / "model.safetensors", shallow=False)


def test_the_newest_whole_checkpoint_is_the_default_and_others_can_be_named(original, run):
    newest = export_run(run, show_progress=False)
    assert newest == run / "exports" / "step_1000000"
    assert holds(newest, models(original)[1_000_000])
    assert holds(export_run(run, step=200, show_progress=False), models(original)[200])
    assert (run / "exports" / "step_000200" / "tokenizer.json").is_file()


@pytest.mark.parametrize("missing", ["trainer_state.json", "mcore/.metadata", "mcore/metadata.json"])
def test_a_checkpoint_that_is_not_whole_is_passed_over_and_said(missing, original, run, caplog):
    broken = run / "checkpoints" / "step_1000000"
    (broken / missing).unlink()
    (run / "checkpoints" / "step_2000000.tmp").mkdir()
    assert holds(export_run(run, show_progress=False), models(original)[200])
    assert [r.getMessage() for r in caplog.records] == [f"{broken}: is passed over: {missing} is missing"]
    with pytest.raises(ValueError, match=r"^step=1000000: no whole checkpoint of it in .*; there are 100, 200$"):
        export_run(run, step=1_000_000)
    assert not (run / "exports" / "step_1000000").exists()


def test_an_evaluation_of_a_run_takes_the_newest_checkpoint_that_is_not_damaged(original, run, monkeypatch, caplog):
    damaged = run / "checkpoints" / "step_1000000"

    def find_damage(checkpoint: Path, *_: object, **__: object) -> str | None:
        return "mcore/__0_0.distcp: a bit has flipped" if checkpoint == damaged else None

    monkeypatch.setattr("megatron_dypo.mcore.checkpoints.export_run.find_damage", find_damage)
    for _ in range(2):
        assert hf_folder_of(str(run)) == run / "exports" / "step_000200"
    assert holds(run / "exports" / "step_000200", models(original)[200])
    assert f"DAMAGED CHECKPOINT: {damaged}/mcore/__0_0.distcp: a bit has flipped" in caplog.text
    assert hf_folder_of(str(run / "checkpoints" / "step_000100")) == run / "exports" / "step_000100"


def test_a_step_that_is_not_there_names_those_that_are(run):
    with pytest.raises(ValueError, match=r"^step=150: .*; there are 100, 200, 1000000$"):
        export_run(run, step=150)


def test_a_folder_that_is_no_run_is_refused(run, tmp_path):
    with pytest.raises(
        ValueError, match="no folder checkpoints there; a run folder of `megatron-dypo train` is needed"
    ):
        export_run(tmp_path / "nowhere")
    for step in whole_checkpoints(run / "checkpoints").values():
        shutil.rmtree(step)
    with pytest.raises(ValueError, match="no whole checkpoint there"):
        export_run(run)


def test_an_hf_folder_is_replaced_only_on_request_and_nothing_else_is(original, run, tmp_path):
    out = export_run(run, step=100, out_dir=tmp_path / "out", show_progress=False)
    with pytest.raises(ValueError, match="out: is there already; --overwrite replaces it"):
        export_run(run, step=200, out_dir=out)
    assert holds(out, models(original)[100])
    export_run(run, step=200, out_dir=out, overwrite=True, show_progress=False)
    assert holds(out, models(original)[200])
    for other in (run, run.parent):
        with pytest.raises(ValueError, match="is not an empty folder"):
            export_run(run, out_dir=other, overwrite=True)
    for inside in (run / "checkpoints", run / "checkpoints" / "step_000100" / "mcore" / "hf"):
        with pytest.raises(ValueError, match="must not be among the checkpoints of the run"):
            export_run(run, out_dir=inside, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_an_export_that_fails_leaves_what_was_there(original, run, tmp_path):
    out = export_run(run, step=100, out_dir=tmp_path / "out", show_progress=False)
    (data,) = (run / "checkpoints" / "step_000200" / "mcore").glob("*.distcp")
    data.write_bytes(data.read_bytes()[:5000])
    with pytest.raises(ValueError, match=f"{data}: damaged at "):
        export_run(run, step=200, out_dir=out, overwrite=True, show_progress=False)
    assert holds(out, models(original)[100])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_the_command_prints_the_folder(run):
    command = [sys.executable, "-m", "megatron_dypo.cli", "export", str(run), "--step", "100"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, str(run / "exports" / "step_000100"))


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 663\n", "a git-lfs pointer, not the file"),
        (b"", "damaged"),
        (b"\x80\x02}q\x00(X", "damaged"),
        (b"version", "damaged"),
    ],
)
def test_a_damaged_file_of_a_checkpoint_is_named(file, content, message, run):
    path = run / "checkpoints" / "step_000100" / "mcore" / file
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        export_run(run, step=100, show_progress=False)


def test_a_place_where_no_folder_can_be_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/out: cannot be created: Not a directory"):
        export_run(run, step=100, out_dir=tmp_path / "file" / "out", show_progress=False)
