"""The state besides tensors is read without code, from where core 0.16 to 0.18 write it and from where 0.19 does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from megatron_dypo.mcore.compat.checkpoint_files import storage_info
from megatron_dypo.mcore.compat.restricted_reading import load_common
from tests.support.exploits import saved_by_torch

STATE = {"optimizer": {"step": 3}, "lr": 0.5}


def in_tensor_file(folder: Path, content: bytes) -> Metadata:
    """Write ``content`` behind other bytes of a tensor file, under the name of core 0.19."""
    before = b"a tensor"
    (folder / "__0_0.distcp").write_bytes(before + content + b"another")
    info = storage_info("__0_0.distcp", len(before), len(content))
    return Metadata({}, storage_data={MetadataIndex("common_state/shard_0_1"): info})


def saved(state: object, folder: Path) -> bytes:
    torch.save(state, folder / "state")
    return (folder / "state").read_bytes()


def test_common_pt_is_read(tmp_path: Path) -> None:
    (tmp_path / "common.pt").write_bytes(saved(STATE, tmp_path))
    assert load_common(tmp_path, Metadata({}, storage_data={})) == STATE


def test_the_state_in_a_tensor_file_is_read(tmp_path: Path) -> None:
    metadata = in_tensor_file(tmp_path, saved([STATE], tmp_path))
    assert load_common(tmp_path, metadata) == STATE


def test_an_exploit_in_either_place_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    metadata = in_tensor_file(tmp_path, saved_by_torch(marker))
    with pytest.raises(ValueError, match=r"__0_0\.distcp: damaged: "):
        load_common(tmp_path, metadata)
    (tmp_path / "common.pt").write_bytes(saved_by_torch(marker))
    with pytest.raises(ValueError, match=r"common\.pt: damaged: "):
        load_common(tmp_path, metadata)
    assert not marker.exists()


def test_a_checkpoint_without_either_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"common\.pt: damaged: .*No such file"):
        load_common(tmp_path, Metadata({}, storage_data={}))


def test_a_state_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    (tmp_path / "common.pt").write_bytes(saved([STATE], tmp_path))
    with pytest.raises(ValueError, match=rf"^{tmp_path}/common\.pt: damaged: holds list, must hold a mapping$"):
        load_common(tmp_path, Metadata({}, storage_data={}))
    metadata = in_tensor_file(tmp_path, saved([[1]], tmp_path))
    (tmp_path / "common.pt").unlink()
    with pytest.raises(ValueError, match=r"__0_0\.distcp: damaged: holds list, must hold a mapping$"):
        load_common(tmp_path, metadata)
