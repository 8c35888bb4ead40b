"""No file of a checkpoint runs code, whichever command reads it."""

from __future__ import annotations

import contextlib
import logging
import pickle
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from megatron_dypo.cli import app
from megatron_dypo.data.tokenizer.open import load_tokenizer
from megatron_dypo.eval.model import hf_folder_of
from megatron_dypo.launch.probe_target import probe_target
from megatron_dypo.mcore.checkpoints.choose import newest_whole
from megatron_dypo.mcore.checkpoints.convert import mcore_to_hf
from megatron_dypo.mcore.checkpoints.folder import STATE, TRACKER, candidates
from megatron_dypo.mcore.checkpoints.manifest import MANIFEST
from megatron_dypo.mcore.checkpoints.verify import ALONE, find_damage
from megatron_dypo.mcore.compat.restricted_pickle import load_metadata
from tests.support.dist.spawn import run_ranks
from tests.support.exploits import hide_in_tensor_files
from tests.support.hf_models import make_hf_model
from tests.support.hostile_runs import NEWER, OLDER, PARTS, hostile_runs, save_run
from tests.support.present import present

NOT_IN_A_RESUME = ("mcore/hf/", TRACKER)
"""Beginnings of the names of files that give no error in a resume: it does not read the former, and an unusable tracker
counts as lost."""
IN_AN_EXPORT = ("mcore/.metadata", "mcore/__", "mcore/hf/config.json", "mcore/hf/generation_config.json")
"""Beginnings of the names of files that an export reads; it copies those of the tokenizer."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_model("qwen2", tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def original(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(model, tmp_path_factory.mktemp("original") / "run")


def error_of(action: Callable[[], object]) -> str:
    try:
        action()
    except ValueError as found:
        return str(found)
    return ""


def rank_try(path: str, runs: list[str], control: str) -> list[tuple[str, str]]:
    """Return the errors of a resume and of ``model.mcore_path`` (for π_ref's part as well) with each run's checkpoint.

    Then let Megatron read the checkpoint of ``control`` on its own.
    """
    from types import SimpleNamespace
    from typing import Any

    from megatron.core import dist_checkpointing

    from megatron_dypo.config.model import ParallelConfig
    from megatron_dypo.loop.resume import restore_batch
    from megatron_dypo.mcore.checkpoints import checkpoint
    from megatron_dypo.mcore.checkpoints.weights import load_weights, model_state
    from megatron_dypo.mcore.reference import ReferencePolicy
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.parallel.groups import close
    from tests.support.dist.training import start

    parallel = ParallelConfig()
    layout = start_megatron(parallel)
    session = start(path, layout, parallel, distributed=True)
    chunks, reference = session.chunks, ReferencePolicy(session.chunks)
    replica: Any = SimpleNamespace(draws=SimpleNamespace(replicas=1, replica=0))
    batch = {"orders": [], "passes": 0, "position": 0}

    def resume(root: Path) -> None:
        chosen = present(newest_whole(candidates(root)[:1], "full", ALONE))
        restored = checkpoint.load(
            chosen, chunks=chunks, optimizer=session.optimizer, layout=layout, reference=reference
        )
        stored: Any = SimpleNamespace(trainer_state={"batch": batch}, leader_states=restored.leader_states)
        restore_batch(stored, replica, chosen)

    def initial(folder: Path) -> None:
        for part in PARTS:
            load_weights(folder / part, chunks)

    roots = [Path(run) / "checkpoints" for run in runs]
    found = [(error_of(partial(resume, root)), error_of(partial(initial, root / NEWER))) for root in roots]
    with contextlib.suppress(ValueError):  # core 0.19 takes the exploit's result for the common state
        dist_checkpointing.load(model_state(chunks), f"{control}/mcore")
    close(layout)
    return found


def test_no_exploit_in_any_file_of_a_checkpoint_runs_in_a_resume_or_as_initial_weights(
    model: Path, original: Path, tmp_path: Path
) -> None:
    """The manifest matches the exploit, so that it is read."""
    marker, unguarded = tmp_path / "marker", tmp_path / "unguarded"
    runs = hostile_runs(original, tmp_path / "runs", marker, sealed=True)
    control = Path(shutil.copytree(original / "checkpoints" / NEWER, tmp_path / "control"))
    hide_in_tensor_files(control / "mcore", unguarded, objects=True)
    (errors,) = run_ranks(1, rank_try, str(model), [str(run.dir) for run in runs], str(control))
    assert not marker.exists()
    assert unguarded.exists(), "Megatron's own reading must run the exploit, else this test shows nothing"
    for run, (resumed, initial) in zip(runs, errors, strict=True):
        file = named_by_a_resume(run.name)
        assert (file in resumed) if file else not resumed, (run, resumed)
        is_read = run.name == MANIFEST or (run.name.startswith(PARTS) and not run.name.startswith("mcore/hf/"))
        assert (f"{run.checkpoint}/{run.name}" in initial) if is_read else not initial, (run, initial)


def named_by_a_resume(name: str) -> str:
    """Return the text that the error of a resume has for a hostile file; nothing if there is no error."""
    if name.startswith(NOT_IN_A_RESUME):
        return ""
    return f"{NEWER}: a file leader_*.bin is damaged" if name.startswith("leader_") else f"{NEWER}/{name}: "


@pytest.fixture
def own_log() -> Iterator[None]:
    """Give the package's logger its settings back, which commands change."""
    logger = logging.getLogger("megatron_dypo")
    handlers, level, propagates = [*logger.handlers], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagates
    logger.setLevel(level)


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def evaluate(run_dir: Path) -> None:
    """Read what `megatron-dypo eval` reads before it starts servers."""
    load_tokenizer(hf_folder_of(str(run_dir)))


@pytest.mark.usefixtures("own_log")
def test_no_exploit_in_any_file_of_a_checkpoint_runs_in_a_command(original: Path, tmp_path: Path) -> None:
    """The manifest matches the exploit, so that it is read. A probe loads the weights as a resume does."""
    marker = tmp_path / "marker"
    for run in hostile_runs(original, tmp_path / "runs", marker, sealed=True):
        is_manifest, is_configuration = run.name == MANIFEST, run.name.startswith("mcore/hf/")
        is_read = run.name.startswith(IN_AN_EXPORT) and run.inside != "objects"

        listed = command("checkpoints", run.dir, "--verify")
        assert listed.exit_code == (65 if is_manifest else 0), (run, listed.output)
        assert (f"DAMAGED: {run.name}: " in listed.output) == is_manifest, (run, listed.output)

        exported = command("export", run.dir, "--out", run.dir / "out")
        assert isinstance(exported.exception, ValueError) == is_read, (run, exported.exception)
        assert (f"{run.checkpoint}/{run.name}: " in str(exported.exception)) == is_read, (run, exported.exception)
        assert (f"DAMAGED CHECKPOINT: {run.checkpoint}/{MANIFEST}: " in exported.output) == is_manifest, run

        evaluated = error_of(partial(evaluate, run.dir))
        is_named = is_read or is_configuration  # with a damaged manifest the older checkpoint is taken
        assert (f"/{Path(run.name).name}: " in evaluated) == is_named, (run, evaluated)

        probed = present(probe_target(run.dir).checkpoint)
        assert probed == run.root / (OLDER if run.name == STATE else NEWER), run
        assert (find_damage(probed, "full") is not None) == is_manifest, run
    assert not marker.exists()


@pytest.mark.usefixtures("own_log")
def test_a_file_that_became_an_exploit_is_damage_and_the_older_checkpoint_is_taken(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The manifest is that of the run, as whoever changes one file leaves it."""
    marker = tmp_path / "marker"
    for run in hostile_runs(original, tmp_path / "runs", marker, sealed=False):
        if run.inside != "all":
            continue  # it changes two files
        is_damage, damage = run.name != TRACKER, f"DAMAGED CHECKPOINT: {run.checkpoint}/{run.name}: "

        listed = command("checkpoints", run.dir)
        assert listed.exit_code == (65 if is_damage else 0), run
        assert (f"DAMAGED: {run.name}: " in listed.output) == is_damage, (run, listed.output)

        exported = command("export", run.dir)
        assert exported.exit_code == 0, (run, exported.exception)
        assert (damage in exported.output) == is_damage, (run, exported.output)
        assert (run.dir / "exports" / (OLDER if is_damage else NEWER)).is_dir(), run

        capsys.readouterr()
        assert newest_whole(candidates(run.root), "full", ALONE) == run.root / (OLDER if is_damage else NEWER), run
        assert (damage if is_damage else f"{run.root}/{TRACKER}: names no checkpoint") in capsys.readouterr().err, run
    assert not marker.exists()


def test_no_exploit_in_a_checkpoint_runs_in_a_converter(original: Path, tmp_path: Path) -> None:
    marker, beside = tmp_path / "marker", ("mcore/hf/config.json", "mcore/hf/generation_config.json", MANIFEST)
    for run in hostile_runs(original, tmp_path / "runs", marker, sealed=True):
        for part in PARTS:
            convert = partial(mcore_to_hf, run.checkpoint / part, run.dir / part, show_progress=False)
            error, reads = error_of(convert), (f"{part}/.metadata", f"{part}/__", *beside)
            is_read = run.name.startswith(reads) and run.inside != "objects"
            assert (f"{run.checkpoint}/{run.name}: " in error) == bool(error) == is_read, (run, error)
    assert not marker.exists()


def test_metadata_that_leads_out_of_its_folder_is_refused(original: Path, tmp_path: Path) -> None:
    metadata = pickle.loads((original / "checkpoints" / NEWER / "mcore" / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../__0_0.distcp"
    path = tmp_path / ".metadata"
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"names a file outside of its folder, \.\./__0_0\.distcp"):
        load_metadata(path)
