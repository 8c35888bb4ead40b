"""The unpicklers for files of a checkpoint know only the classes of such files."""

from __future__ import annotations

import enum
import io
import os
import pathlib
import pickle
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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


def text(value: str) -> bytes:
    return pickle.SHORT_BINUNICODE + bytes([len(value)]) + value.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + pickle.STACK_GLOBAL


PATH, SIZE = named("pathlib", "PosixPath"), named("torch", "Size")
LAYOUT = named("torch.serialization", "_get_layout")
ITEMS = pickle.EMPTY_DICT + text("is_file") + SIZE + pickle.SETITEM
SLOTS = pickle.NONE + ITEMS + pickle.TUPLE2
"""The state by which BUILD sets attributes of whatever is under it."""
ONE = pickle.BININT1 + b"\1"
CHANGES = {
    "class": PATH + SLOTS + pickle.BUILD,
    "class, by its dict": PATH + ITEMS + pickle.BUILD,
    "class, in the form of protocol 0": b"cpathlib\nPosixPath\n(N(dS'is_file'\nctorch\nSize\nstb",
    "function": LAYOUT + pickle.NONE + pickle.EMPTY_DICT + text("__kwdefaults__") + ITEMS + pickle.SETITEM
    + pickle.TUPLE2 + pickle.BUILD,
    "function, by its dict": LAYOUT + pickle.EMPTY_DICT + text("cache") + ITEMS + pickle.SETITEM + pickle.BUILD,
    "result of a call": PATH + pickle.EMPTY_TUPLE + pickle.REDUCE + SLOTS + pickle.BUILD,
    "state given twice": PATH + pickle.EMPTY_TUPLE + pickle.NEWOBJ + (pickle.EMPTY_DICT + pickle.BUILD) * 2,
    "append to a class": PATH + ONE + pickle.APPEND,
    "appends to a class": PATH + pickle.MARK + ONE + pickle.APPENDS,
    "item of a class": PATH + ONE + ONE + pickle.SETITEM,
    "items of a class": PATH + pickle.MARK + ONE + ONE + pickle.SETITEMS,
    "member of a class": pickle.EMPTY_SET + pickle.MARK + PATH + pickle.ADDITEMS,
    "call of a result": PATH + pickle.EMPTY_TUPLE + pickle.REDUCE + pickle.EMPTY_TUPLE + pickle.REDUCE,
    "registered extension": pickle.EXT1 + b"\1",
    "persistent id": ONE + pickle.BINPERSID,
    "old instance": b"(ipathlib\nPosixPath\n",
    "huge buffer": pickle.BYTEARRAY8 + (2**60).to_bytes(8, "little"),
    "huge bytes": pickle.BINBYTES8 + (2**60).to_bytes(8, "little"),
    "huge frame": pickle.FRAME + (2**60).to_bytes(8, "little"),
    "huge number of an object": ONE + pickle.LONG_BINPUT + (2**32 - 1).to_bytes(4, "little"),
    "huge size": SIZE + pickle.LONG1 + b"\xff" + bytes(254) + b"\1" + pickle.TUPLE1 * 2 + pickle.REDUCE,
    "deep tuple": pickle.EMPTY_TUPLE + pickle.TUPLE1 * 1_000_000,
    "deep list": pickle.EMPTY_LIST * 1_000_000 + pickle.APPEND * 999_999,
    "endless hash": pickle.EMPTY_DICT + pickle.EMPTY_TUPLE
    + (pickle.MEMOIZE + pickle.BINGET + b"\0" + pickle.TUPLE2 + pickle.BINPUT + b"\0") * 60 + ONE + pickle.SETITEM,
    "list of itself": pickle.EMPTY_LIST + pickle.MEMOIZE + pickle.BINGET + b"\0" + pickle.APPEND,
    "unknown opcode": b"\xff",
    "nothing": b"",
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_a_hostile_metadata_changes_nothing_and_is_an_error_of_one_line(case: str, tmp_path: Path) -> None:
    path = tmp_path / ".metadata"
    path.write_bytes(pickle.PROTO + b"\4" + CHANGES[case] + pickle.STOP)
    layout: Any = torch.serialization._get_layout
    before = (dict(vars(pathlib.PosixPath)), dict(vars(layout)), layout.__kwdefaults__)
    with pytest.raises(ValueError, match=rf"^{path}: damaged: ") as caught:
        load_metadata(path)
    assert (dict(vars(pathlib.PosixPath)), dict(vars(layout)), layout.__kwdefaults__) == before
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


class Format(enum.Enum):
    E4M3 = 448
    HYBRID = 57344


@dataclass
class Recipe:
    margin: int = 0
    fp8_format: Format = Format.HYBRID
    extra: dict[str, int] = field(default_factory=dict)


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the two classes be those of Transformer Engine's recipes."""
    module = types.ModuleType("transformer_engine.common.recipe")
    for cls in (Format, Recipe):
        monkeypatch.setattr(cls, "__module__", module.__name__)
        monkeypatch.setattr(module, cls.__name__, cls, raising=False)
    for name in ("transformer_engine", "transformer_engine.common"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def require_plain(content: bytes) -> None:
    require_plain_state("s", torch.frombuffer(bytearray(content), dtype=torch.uint8))


@pytest.mark.usefixtures("recipes")
def test_a_state_with_a_recipe_passes() -> None:
    state = {"recipe": Recipe(margin=2, extra={"a": 1}), "scale_fwd": torch.ones(3)}
    for protocol in (3, 4, 5):
        require_plain(pickle.dumps(state, protocol=protocol))


@pytest.mark.usefixtures("recipes")
@pytest.mark.parametrize("make", [pickle.REDUCE, pickle.NEWOBJ])
def test_a_state_that_changes_a_shared_object_is_refused(make: bytes) -> None:
    """The member of the enumeration is changed when the pickle is read with code, as Transformer Engine reads it."""
    member = named("transformer_engine.common.recipe", "Format") + pickle.BININT2 + b"\xc0\1" + pickle.TUPLE1 + make
    content = pickle.PROTO + b"\4" + member + pickle.EMPTY_DICT + text("_value_") + ONE + pickle.SETITEM
    content += pickle.BUILD + pickle.STOP
    with pytest.raises(ValueError, match=r"^s: refused: it changes what it did not make$"):
        require_plain(content)
    assert Format.E4M3.value == 448
    pickle.loads(content)
    value, Format.E4M3._value_ = Format.E4M3.value, 448
    assert value == 1, "reading it with code must change the member, else this test shows nothing"
