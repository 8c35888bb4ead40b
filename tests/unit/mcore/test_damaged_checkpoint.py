"""A checkpoint with a damaged or missing file is named, with what to do. It is not reported as a bug of the package."""

from pathlib import Path

import pytest

from megatron_dypo.mcore.checkpoints import parts


def test_weights_that_cannot_be_read_are_named_by_their_file(tmp_path: Path) -> None:
    def error() -> str:
        with pytest.raises(ValueError, match=str(tmp_path)) as caught:
            parts.load_parts({}, tmp_path)
        return str(caught.value)

    assert error().startswith(f"{tmp_path}/metadata.json: cannot be read: ")
    (tmp_path / "metadata.json").write_bytes(b"{")
    assert error().startswith(f"{tmp_path}/metadata.json: cannot be read: ")
    for content, message in (
        (b"{}", "sharded_backend"),
        (b'{"sharded_bac+end": "torch_dist"}', "sharded_bac"),
        (b'{"sharded_backend": ["torch_dist"]}', r"sharded_backend=['torch_dist']: must be a text or a number"),
        (b"[" * 200_000, "cannot be read: nested too deeply"),
    ):
        (tmp_path / "metadata.json").write_bytes(content)
        assert error().startswith(f"{tmp_path}/metadata.json: ")
        assert message in error()
    (tmp_path / "metadata.json").write_bytes(b'{"sharded_backend": "torch_dist"}')
    assert error().startswith(f"{tmp_path}/.metadata: cannot be read: ")
    (tmp_path / ".metadata").write_bytes(b"no pickle")
    assert error().startswith(f"{tmp_path}/.metadata: damaged: ")


def test_a_checkpoint_without_a_leaders_file_is_not_resumed_with_fewer_samples(tmp_path: Path) -> None:
    (tmp_path / "leader_00001.bin").write_bytes(b"b")
    with pytest.raises(ValueError, match=rf"^{tmp_path}: has 1 files leader_\*\.bin of 2: restore it"):
        parts.leader_states(tmp_path, {"data": 2})
    (tmp_path / "leader_00000.bin").write_bytes(b"a")
    assert parts.leader_states(tmp_path, {"data": 2}) == [b"a", b"b"]
