"""The unpicklers for files of a checkpoint know only the classes of such files."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_dypo.mcore.compat.restricted_pickle import load_metadata, require_plain_state, te_may_unpickle
from tests.support.exploits import pickled, saved_by_torch


@pytest.mark.parametrize("make", [pickled, saved_by_torch])
def test_a_state_of_transformer_engine_that_would_run_code_is_refused(
    make: Callable[[Path], bytes], tmp_path: Path
) -> None:
    """Transformer Engine unpickles a tensor of bytes, or loads a stream."""
    marker = tmp_path / "marker"
    content = make(marker)
    for state in (torch.frombuffer(bytearray(content), dtype=torch.uint8), io.BytesIO(content)):
        with pytest.raises(ValueError, match=r"^linear_fc1\._extra_state: "):
            require_plain_state("linear_fc1._extra_state", state)
    assert not marker.exists()


def test_states_of_tensors_and_numbers_pass() -> None:
    state = {"scale_fwd": torch.ones(3), "amax_history_fwd": torch.zeros(4, 3), "extra_fp8_variables": {"a": (1, "b")}}
    content = pickle.dumps(state, protocol=3)
    by_megatron = content.replace(
        b"ctorch.storage\n_load_from_bytes", b"cmegatron.core.safe_globals\nsafe_load_from_bytes"
    )
    for one in (pickle.dumps(state), content, by_megatron):  # the last is that of core 0.17 and later
        require_plain_state("s", torch.frombuffer(bytearray(one), dtype=torch.uint8))
    stream = io.BytesIO()
    torch.save([state], stream)
    stream.seek(0)
    require_plain_state("s", stream)
    assert len(torch.load(stream, weights_only=True)) == 1, "the stream must be at its beginning again"
    for empty in (None, torch.empty(0, dtype=torch.uint8)):
        require_plain_state("s", empty)


@pytest.mark.parametrize("before", [None, "0"])
def test_transformer_engine_may_unpickle_only_while_checked_states_are_loaded(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
    if before is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, before)

    def fail() -> None:
        assert os.environ[name] == "1"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), te_may_unpickle():
        fail()
    assert os.environ.get(name) == before


@pytest.mark.parametrize(
    "name", ["builtins.eval", "os.system", "torch.load", "torch.distributed.checkpoint.filesystem.FileSystemReader"]
)
def test_metadata_knows_only_its_own_classes(name: str, tmp_path: Path) -> None:
    module, _, attribute = name.rpartition(".")
    path = tmp_path / ".metadata"
    path.write_bytes(f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(ValueError, match=rf"^{path}: damaged: refused, since it would run code: it asks for {name}$"):
        load_metadata(path)
