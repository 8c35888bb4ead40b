"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from megatron_dypo.fs import (
    commit_folder,
    make_exclusively,
    new_file,
    new_folder,
    partial_path,
    private_folder,
    replace_file,
)
from megatron_dypo.parallel.environment import set_kernel_cache
from tests.support.folders import STRANGE_FOLDERS, make_strange_folder


class Disk:
    """The record of names that were synced and renamed, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """Record each fsync and rename, and do it."""
    disk, fsync, replace, rename = Disk(), os.fsync, os.replace, os.rename

    def noted_fsync(descriptor: int) -> None:
        disk.calls.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        disk.calls.append(f"name {Path(target).name}")
        replace(source, target)

    def noted_rename(source: Path, target: Path) -> None:
        disk.calls.append(f"name {Path(target).name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    monkeypatch.setattr(os, "rename", noted_rename)
    return disk


@pytest.mark.parametrize("content", ["prompt é\n", b"\xff\x00", "", b""])
def test_a_file_holds_what_was_written_and_nothing_lies_beside_it(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "status.json"
    path.write_text("old")
    replace_file(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]


def test_a_durable_file_is_on_the_disk_before_its_name_and_its_name_before_the_return(
    tmp_path: Path, disk: Disk
) -> None:
    replace_file(tmp_path / "config.yaml", "a: 1\n")
    content, name, folder = disk.calls
    assert content.startswith("sync config.yaml.")
    assert (name, folder) == ("name config.yaml", f"sync {tmp_path.name}")


def test_a_cheap_file_waits_for_no_disk(tmp_path: Path, disk: Disk) -> None:
    replace_file(tmp_path / "samples.jsonl", "{}\n", durable=False)
    assert disk.calls == ["name samples.jsonl"]


def test_a_file_whose_writer_fails_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "check.npz"
    path.write_text("old")

    def write_half() -> None:
        with new_file(path) as file:
            file.write(b"half")
            raise KeyError("a bug of the writer")

    with pytest.raises(KeyError):
        write_half()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["check.npz"]


def test_a_file_whose_writer_is_killed_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom megatron_dypo.fs import new_file\n"
        f"with new_file(Path({str(path)!r})) as file:\n    file.write(b'half'); file.flush(); os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    )
    assert killed.returncode == -9
    assert path.read_text() == "old"


def test_a_reader_sees_the_old_content_or_the_new_one_and_no_mixture(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    versions = {b"a" * 100_000, b"b" * 50_000}
    replace_file(path, b"a" * 100_000)
    over = threading.Event()

    def write() -> None:
        for _ in range(100):
            for content in sorted(versions):
                replace_file(path, content, durable=False)
        over.set()

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    while not over.is_set():
        assert path.read_bytes() in versions
    for writer in writers:
        writer.join()
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]


def test_of_many_processes_one_makes_a_file(tmp_path: Path) -> None:
    made: list[str] = []

    def make(name: str) -> None:
        if make_exclusively(tmp_path / "run.lock", name):
            made.append(name)

    threads = [threading.Thread(target=make, args=(str(i),)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [(tmp_path / "run.lock").read_text()]
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.lock"]


def test_a_folder_gets_its_name_when_all_that_it_holds_is_on_the_disk(tmp_path: Path, disk: Disk) -> None:
    with new_folder(tmp_path / "hf") as folder:
        (folder / "part").mkdir()
        (folder / "part/model.safetensors").write_bytes(b"\x00")
        assert not (tmp_path / "hf").exists()
    named = disk.calls.index("name hf")
    assert set(disk.calls[:named]) == {"sync part", "sync model.safetensors", "sync .hf.partial"}
    assert disk.calls[named + 1 :] == [f"sync {tmp_path.name}"]
    assert (tmp_path / "hf/part/model.safetensors").read_bytes() == b"\x00"


def test_a_folder_whose_filling_fails_leaves_nothing(tmp_path: Path) -> None:

    def fill_half() -> None:
        with new_folder(tmp_path / "hf") as folder:
            (folder / "half").touch()
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        fill_half()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", ["folder", "file", "dangling link", "link to a folder"])
def test_a_folder_takes_the_place_of_what_has_its_name(tmp_path: Path, there: str) -> None:
    path, elsewhere = tmp_path / "step_000001", tmp_path / "elsewhere"
    if there == "folder":
        path.mkdir()
        (path / "old").touch()
    elif there == "file":
        path.write_text("old")
    else:
        path.symlink_to(elsewhere, target_is_directory=True)
    if there == "link to a folder":
        elsewhere.mkdir()
        (elsewhere / "kept").touch()
    partial = partial_path(path)
    partial.mkdir()
    (partial / "new").touch()
    commit_folder(partial, path)
    assert [entry.name for entry in path.iterdir()] == ["new"]
    assert {entry.name for entry in tmp_path.iterdir()} <= {"step_000001", "elsewhere"}
    assert not elsewhere.exists() or (elsewhere / "kept").exists()


@pytest.mark.parametrize("kind", STRANGE_FOLDERS)
def test_a_private_folder_is_none_that_another_user_could_write_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    make_strange_folder(tmp_path / "cache", kind)
    found = private_folder(tmp_path / "cache")
    assert found.parent == tmp_path
    assert found.name.startswith("cache.")
    assert (found.lstat().st_uid, found.lstat().st_mode & 0o777) == (os.getuid(), 0o700)
    assert "cache is not a folder that only this user may write to" in caplog.text


def test_a_private_folder_is_made_closed_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "cache"
    assert private_folder(path) == path
    path.chmod(0o755)
    assert private_folder(path) == path
    assert path.stat().st_mode & 0o777 == 0o700
    assert caplog.text == ""


def test_kernels_are_compiled_into_a_private_folder_unless_the_environment_names_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    make_strange_folder(tmp_path / f"dypo-cache-{os.getuid()}", "a link")
    environment: dict[str, str] = {}
    set_kernel_cache(environment)
    (made,) = tmp_path.glob("dypo-cache-*.*")
    assert environment == {"TORCHINDUCTOR_CACHE_DIR": f"{made}/inductor"}
    chosen = {"TORCHINDUCTOR_CACHE_DIR": "/mine"}
    set_kernel_cache(chosen)
    assert chosen == {"TORCHINDUCTOR_CACHE_DIR": "/mine"}
