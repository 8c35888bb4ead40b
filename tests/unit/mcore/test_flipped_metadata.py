"""One flipped bit of ``.metadata`` is harmless, or an error of one line that names the checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_dypo.mcore.checkpoints.convert import hf_to_mcore, mcore_to_hf
from megatron_dypo.mcore.checkpoints.export_run import export_run
from megatron_dypo.mcore.checkpoints.folder import STATE
from megatron_dypo.mcore.checkpoints.manifest import MANIFEST, list_files, record_files, write_manifest
from megatron_dypo.mcore.checkpoints.torch_dist import MCoreReader
from megatron_dypo.mcore.checkpoints.verify import HAS_MANIFEST
from megatron_dypo.models.architecture import load_architecture
from megatron_dypo.models.families.registry import family_rows
from megatron_dypo.parallel.mesh import Mesh
from tests.support.flips import error_of, flips
from tests.support.hf_models import make_hf_model


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("converted")
    hf_to_mcore(make_hf_model("qwen2", root / "hf"), root / "mcore", mesh=Mesh(tensor=2), show_progress=False)
    return root / "mcore"


def everything_read(folder: Path) -> list[bytes]:
    """Return all that the converter reads of a checkpoint: types, writers and values of its tensors."""
    reader, arch = MCoreReader(folder), load_architecture(folder / "hf")
    reader.check_complete(arch)
    rows = [row for row in family_rows(arch) if not row.is_copy]
    names = [f"{row.mcore} {reader.dtype(row, arch)} {reader.writer(row, arch)}".encode() for row in rows]
    return names + [tensor.numpy().tobytes() for row in rows for tensor in reader.read_hf(row, arch)]


def test_a_flip_in_the_metadata_of_a_foreign_checkpoint_is_harmless_or_names_it(
    converted: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(converted, tmp_path / "mcore"))
    (folder / MANIFEST).unlink()
    expected: list[bytes] = everything_read(folder)
    read: list[bytes] = []
    harmless = 0
    for flip in flips(folder / ".metadata", 600):
        read.clear()
        error = error_of(lambda: read.extend(everything_read(folder)))
        assert error.startswith(str(folder)) if error else read == expected, (flip, error)
        assert "\n" not in error, flip
        harmless += not error
    assert 0 < harmless < 200


def test_a_flip_in_a_small_file_is_found_before_the_file_is_parsed(converted: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000002"
    shutil.copytree(converted, checkpoint / "mcore")
    (checkpoint / "mcore" / MANIFEST).unlink()
    (checkpoint / STATE).write_text(json.dumps({"step": 2, HAS_MANIFEST: True, "trainer": {}}))
    write_manifest(checkpoint, record_files(checkpoint, list_files(checkpoint)))
    for name in (".metadata", "common.pt", "metadata.json", "hf/config.json"):
        for number, flip in enumerate(flips(checkpoint / "mcore" / name, 300 if name == ".metadata" else 30)):
            out = tmp_path / f"{number}"
            for action in (
                lambda out=out: export_run(tmp_path / "run", step=2, out_dir=out, show_progress=False),
                lambda out=out: mcore_to_hf(checkpoint, out, show_progress=False),
            ):
                error = error_of(action)
                assert error.startswith(f"{checkpoint}/mcore/{name}: bytes 0 to "), (flip, error)
                assert "\n" not in error, flip
