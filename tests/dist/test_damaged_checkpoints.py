"""Damage of any file of a checkpoint is found and named, and the run goes on from the older whole one."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dypo.mcore.checkpoints.choose import newest_whole
from megatron_dypo.mcore.checkpoints.convert import hf_to_mcore, mcore_to_hf
from megatron_dypo.mcore.checkpoints.export_run import export_run
from megatron_dypo.mcore.checkpoints.folder import TRACKER, candidates
from megatron_dypo.mcore.checkpoints.manifest import MANIFEST
from megatron_dypo.mcore.checkpoints.verify import ALONE, Verify, find_damage
from megatron_dypo.parallel.mesh import Mesh
from tests.support.dist.saved import rank_resume, rank_save
from tests.support.dist.spawn import run_ranks
from tests.support.hf_models import make_hf_model

FLIPS = 300
SEED = 20
STRAY = ["leader_00002.bin", "mcore/__7_0.distcp", "mcore/hf/chat_template.jinja", "other/common.pt"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_model("qwen2", tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def original(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the checkpoints of steps 1 and 2 on two ranks."""
    root = tmp_path_factory.mktemp("run") / "checkpoints"
    run_ranks(2, rank_save, str(model), str(root), (1, 2))
    return root


@pytest.fixture
def root(original: Path, tmp_path: Path) -> Path:
    return copied(original, tmp_path / "checkpoints")


def copied(original: Path, target: Path) -> Path:
    """Copy checkpoints by links. A test may replace files, but must not write into them."""
    return Path(shutil.copytree(original, target, copy_function=os.link))


def files_of(checkpoint: Path) -> list[str]:
    return sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())


def last_file(root: Path) -> str:
    """Return the last file in which rank 0 wrote tensors: the second with core 0.16, the only one since 0.17."""
    return max(path.name for path in (root / "step_000002" / "mcore").glob("__0_*.distcp"))


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    replace(path, bytes(content))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": lambda path: replace(path, path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: replace(path, b""),
    "deleted": lambda path: path.unlink(),
    "doubled": lambda path: replace(path, path.read_bytes() * 2),
}


def test_a_checkpoint_as_it_was_written_is_whole(original: Path) -> None:
    for step in (1, 2):
        assert find_damage(original / f"step_{step:06d}", "full") is None
    recorded = json.loads((original / "step_000002" / MANIFEST).read_text())["files"]
    assert sorted([*recorded, MANIFEST]) == files_of(original / "step_000002")


@pytest.mark.parametrize("verify", ["full", "manifest"])
def test_after_every_flipped_bit_the_older_checkpoint_is_taken_with_a_line_that_names_the_file(
    verify: Verify, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newer, draw = root / "step_000002", random.Random(SEED)
    names = [name for name in files_of(newer) if verify == "full" or not name.endswith(".distcp")]
    silent = []
    for number in range(FLIPS):
        name = names[number % len(names)]
        path = newer / name
        whole, bit = path.read_bytes(), draw.randrange(8 * path.stat().st_size)
        flip(path, bit)
        caplog.clear()
        chosen = newest_whole(candidates(root), verify, ALONE)
        lines = [record.getMessage() for record in caplog.records]
        if len(lines) != 1 or not lines[0].startswith(f"DAMAGED CHECKPOINT: {path}: "):
            silent.append((name, bit, lines))
        if chosen == root / "step_000001":
            (root / "step_000002.damaged").rename(newer)
            replace(root / TRACKER, b"2")
        replace(path, whole)
    assert not silent
    caplog.clear()
    assert newest_whole(candidates(root), verify, ALONE) == newer
    assert not caplog.records


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("verify", ["full", "manifest"])
def test_whatever_happens_to_a_file_the_older_checkpoint_is_taken_with_a_line_that_names_it(
    verify: Verify, damage: str, original: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, name in enumerate(files_of(original / "step_000002")):
        root = copied(original, tmp_path / str(number))
        DAMAGES[damage](root / "step_000002" / name)
        caplog.clear()
        assert newest_whole(candidates(root), verify, ALONE) == root / "step_000001", name
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.startswith(f"DAMAGED CHECKPOINT: {root}/step_000002/{name}: "), line
        assert (root / TRACKER).read_text() == "1"
        assert sorted(path.name for path in root.iterdir() if path.is_dir()) == ["step_000001", "step_000002.damaged"]


def test_a_flipped_bit_of_the_tracker_is_told_and_leads_to_a_whole_checkpoint(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "step_000002").rename(root / "step_000007")
    for step in (3, 5, 6):
        copied(root / "step_000001", root / f"step_{step:06d}")
    chosen = []
    for bit in range(8):
        replace(root / TRACKER, bytes([ord("7") ^ 1 << bit]))
        caplog.clear()
        chosen.append(newest_whole(candidates(root), "full", ALONE))
        (line,) = [record.getMessage() for record in caplog.records]
        path, is_newest = root / TRACKER, chosen[-1] == root / "step_000007"
        assert line.startswith(f"{path}: names no" if is_newest else f"OLDER CHECKPOINT: {path} names "), line
    assert chosen == [root / f"step_{step:06d}" for step in (6, 5, 3, 7, 7, 7, 7, 7)]


@pytest.mark.parametrize("stray", STRAY)
def test_a_file_that_would_be_read_and_was_not_written_is_damage(stray: str, root: Path) -> None:
    path = root / "step_000002" / stray
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")
    assert find_damage(root / "step_000002", "manifest") == f"{stray}: is not a file of this checkpoint"


def test_a_file_that_nobody_reads_is_no_damage(root: Path) -> None:
    (root / "step_000002" / "notes.txt").write_text("the good one")
    (root / "step_000002" / "mcore" / ".nfs0001").write_text("removed, but open")
    assert find_damage(root / "step_000002", "full") is None


@pytest.mark.parametrize("text", ["", "\0\0", "ten", "99", "2\n2"])
def test_a_tracker_that_names_nothing_leads_to_the_newest(text: str, root: Path) -> None:
    replace(root / TRACKER, text.encode())
    assert newest_whole(candidates(root), "full", ALONE) == root / "step_000002"


def test_the_checkpoint_before_the_trackers_is_taken_and_not_a_newer_one(root: Path) -> None:
    replace(root / TRACKER, b"1")
    assert newest_whole(candidates(root), "full", ALONE) == root / "step_000001"
    (root / "step_000001" / "trainer_state.json").unlink()
    with pytest.raises(
        ValueError, match=r"none of 1 checkpoints is whole: step_000001/trainer_state\.json: is missing"
    ):
        newest_whole(candidates(root), "full", ALONE)


def test_without_a_whole_checkpoint_nothing_is_renamed_and_every_reason_said(root: Path) -> None:
    flip(root / "step_000002" / "mcore" / "metadata.json", 7)
    (root / "step_000001" / "mcore" / ".metadata").unlink()
    expected = (
        r"step_000002/mcore/metadata\.json: bytes 0 to .*; step_000001/mcore/\.metadata: is missing: restore one, or"
    )
    with pytest.raises(ValueError, match=expected):
        newest_whole(candidates(root), "full", ALONE)
    assert sorted(path.name for path in root.iterdir() if path.is_dir()) == ["step_000001", "step_000002"]


def test_a_checkpoint_of_an_earlier_version_is_taken_with_one_warning(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = root / "step_000002"
    (checkpoint / MANIFEST).unlink()
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    del state["has_manifest"]
    replace(checkpoint / "trainer_state.json", json.dumps(state).encode())
    assert newest_whole(candidates(root), "full", ALONE) == checkpoint
    assert [record.getMessage() for record in caplog.records] == [
        f"{checkpoint}: an earlier version wrote it, without manifest.json: its files are not verified"
    ]


def test_an_export_takes_the_older_checkpoint_and_refuses_a_damaged_one_that_is_named(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = last_file(root)
    flip(root / "step_000002" / "mcore" / name, 1_000_003)
    expected = f"{root}/step_000002/mcore/{name}: bytes 0 to "
    out = tmp_path / "exports" / "step_000001"
    assert export_run(tmp_path, show_progress=False) == out
    assert [record.getMessage()[: len(expected) + 20] for record in caplog.records] == [
        f"DAMAGED CHECKPOINT: {expected}"
    ]
    for action in (
        lambda: export_run(tmp_path, step=2, show_progress=False),
        lambda: mcore_to_hf(root / "step_000002", tmp_path / "out", show_progress=False),
        lambda: mcore_to_hf(root / "step_000002" / "mcore", tmp_path / "out", show_progress=False),
    ):
        with pytest.raises(ValueError, match=f"^{expected}"):
            action()
    assert [path.name for path in (tmp_path / "exports").iterdir()] == ["step_000001"]


def test_a_converted_checkpoint_has_a_manifest_that_its_readers_compare(model: Path, tmp_path: Path) -> None:
    hf_to_mcore(model, tmp_path / "mcore", mesh=Mesh(tensor=2), show_progress=False)
    mcore_to_hf(tmp_path / "mcore", tmp_path / "hf", show_progress=False)
    flip(tmp_path / "mcore" / "__1_0.distcp", 100_003)
    with pytest.raises(ValueError, match=f"^{tmp_path}/mcore/__1_0.distcp: bytes 0 to "):
        mcore_to_hf(tmp_path / "mcore", tmp_path / "again", show_progress=False)


def test_damage_in_any_ranks_share_makes_all_ranks_take_the_older_one(
    model: Path, original: Path, tmp_path: Path
) -> None:
    """Each of the five runs finds another damage, and goes on from the first step, on both ranks."""
    last = last_file(original)
    damages: dict[str, Callable[[Path], None]] = {
        f"mcore/{last}": functools.partial(flip, bit=1_000_003),
        "reference/__0_0.distcp": functools.partial(flip, bit=1_000_003),
        "mcore/.metadata": DAMAGES["truncated"],
        "leader_00001.bin": DAMAGES["deleted"],
        "trainer_state.json": DAMAGES["emptied"],
    }
    roots = []
    for number, (name, damage) in enumerate(damages.items()):
        roots.append(copied(original, tmp_path / str(number)))
        damage(roots[-1] / "step_000002" / name)
    damaged = roots[0] / "step_000002.damaged" / "mcore"
    results = run_ranks(2, rank_resume, str(model), [*map(str, roots), str(original)], str(damaged))
    leaders = [b"queue of replica 0", b"queue of replica 1"]
    expected = [(1, {"cursor": 1}, leaders)] * len(damages) + [(2, {"cursor": 2}, leaders)]
    assert [found for found, _ in results] == [expected, expected]
    for _, error in results:
        assert error.startswith(f"{damaged}/{last}: bytes 0 to "), error
    for root in roots:
        assert (root / "step_000002.damaged").is_dir()
