"""No file of a checkpoint runs code, whichever command reads it."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_dypo.mcore.checkpoints.convert import mcore_to_hf
from megatron_dypo.mcore.compat.restricted_pickle import load_metadata, require_plain_state, te_may_unpickle
from tests.support.dist.saved import rank_save
from tests.support.dist.spawn import run_ranks
from tests.support.exploits import hide_in_metadata, hide_in_tensor_files, pickled, saved_by_torch
from tests.support.hf_models import make_hf_model

PICKLES = ("mcore/.metadata", "mcore/common.pt", "reference/.metadata", "reference/common.pt")
OTHERS = ("mcore/__0_0.distcp", "mcore/metadata.json", "trainer_state.json")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_model("qwen2", tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def original(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a checkpoint without a manifest, which an attacker could rewrite anyway."""
    root = tmp_path_factory.mktemp("run") / "checkpoints"
    run_ranks(1, rank_save, str(model), str(root), (1,))
    checkpoint = root / "step_000001"
    (checkpoint / "manifest.json").unlink()
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    del state["has_manifest"]
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    return checkpoint


def replaced(checkpoint: Path, name: str, content: bytes) -> str:
    (checkpoint / name).unlink(missing_ok=True)  # core 0.19 writes no common.pt, but reads one that is there
    (checkpoint / name).write_bytes(content)
    return name


def hostile(original: Path, folder: Path, marker: Path) -> dict[str, Path]:
    """Return copies of a checkpoint with an exploit each, by the name of the file that an error must have."""

    def hidden(name: str, change: Callable[[Path], object]) -> tuple[str, Callable[[Path], object]]:
        return name, lambda checkpoint: change(checkpoint / Path(name).parent)

    changes: list[tuple[str, Callable[[Path], object]]] = [
        (name, functools.partial(replaced, name=name, content=make(marker)))
        for name in (*PICKLES, *OTHERS)
        for make in (pickled, saved_by_torch)
    ]
    for part in ("mcore", "reference"):
        changes += [
            hidden(f"{part}/.metadata", lambda path: hide_in_metadata(path / ".metadata", marker)),
            hidden(f"{part}/__0_0.distcp", lambda path: hide_in_tensor_files(path, marker, objects=True)),
            hidden(f"{part}/__0_0.distcp", lambda path: hide_in_tensor_files(path, marker, objects=False)),
        ]
    made = {}
    for number, (name, change) in enumerate(changes):
        checkpoint = Path(shutil.copytree(original, folder / f"{number:02d}" / "step_000001", copy_function=os.link))
        change(checkpoint)
        made[f"{checkpoint}/{name}"] = checkpoint
    return made


def rank_try(path: str, checkpoints: list[str]) -> list[tuple[str, str]]:
    """Return the errors of a resume and of ``model.mcore_path`` (for π_ref's part as well) with each checkpoint.

    Then let Megatron read the last one on its own.
    """
    from megatron.core import dist_checkpointing

    from megatron_dypo.config.model import ParallelConfig
    from megatron_dypo.mcore.checkpoints import checkpoint
    from megatron_dypo.mcore.checkpoints.weights import load_weights, model_state
    from megatron_dypo.mcore.reference import ReferencePolicy
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.parallel.groups import close
    from tests.support.dist.training import start

    def error(action: Callable[[], object]) -> str:
        try:
            action()
        except ValueError as found:
            return str(found)
        return ""

    parallel = ParallelConfig()
    layout = start_megatron(parallel)
    session = start(path, layout, parallel, distributed=True)
    chunks, reference = session.chunks, ReferencePolicy(session.chunks)

    def resume(folder: str) -> None:
        checkpoint.load(folder, chunks=chunks, optimizer=session.optimizer, layout=layout, reference=reference)

    def initial(folder: str) -> None:
        for part in ("mcore", "reference"):
            load_weights(Path(folder) / part, chunks)

    found = [(error(lambda: resume(folder)), error(lambda: initial(folder))) for folder in checkpoints[:-1]]
    assert not found or not list(Path(checkpoints[0]).parents[1].glob("marker"))
    with contextlib.suppress(ValueError):  # core 0.19 takes the exploit's result for the common state
        dist_checkpointing.load(model_state(chunks), f"{checkpoints[-1]}/mcore")
    close(layout)
    return found


def test_no_exploit_in_a_checkpoint_runs_in_a_resume_or_as_initial_weights(
    model: Path, original: Path, tmp_path: Path
) -> None:
    marker, unguarded = tmp_path / "marker", tmp_path / "unguarded"
    checkpoints = hostile(original, tmp_path, marker)
    control = Path(shutil.copytree(original, tmp_path / "control"))
    hide_in_tensor_files(control / "mcore", unguarded, objects=True)
    (errors,) = run_ranks(1, rank_try, str(model), [*map(str, checkpoints.values()), str(control)])
    assert not marker.exists()
    assert unguarded.exists(), "Megatron's own reading must run the exploit, else this test shows nothing"
    for file, (resumed, initial) in zip(checkpoints, errors, strict=True):
        assert file in resumed, resumed
        if not file.endswith("trainer_state.json"):
            assert file in initial, initial


def test_no_exploit_in_a_checkpoint_runs_in_a_converter(original: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for number, (file, checkpoint) in enumerate(hostile(original, tmp_path, marker).items()):
        part = Path(file).parent
        if part == checkpoint or Path(file).name in ("common.pt", "metadata.json") or "objects" in file:
            continue  # a converter does not read them
        try:
            mcore_to_hf(part, tmp_path / f"out_{number}", show_progress=False)
        except ValueError as error:
            assert file in str(error)
    assert not marker.exists()


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
    by_megatron = content.replace(b"ctorch.storage\n_load_from_bytes", b"cmegatron.core.safe_globals\nsafe_load_from_bytes")
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
    with pytest.raises(ZeroDivisionError), te_may_unpickle():
        assert os.environ[name] == "1"
        raise ZeroDivisionError
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


def test_metadata_that_leads_out_of_its_folder_is_refused(original: Path, tmp_path: Path) -> None:
    metadata = pickle.loads((original / "mcore" / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../__0_0.distcp"
    path = tmp_path / ".metadata"
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"names a file outside of its folder, \.\./__0_0\.distcp"):
        load_metadata(path)
