"""Private names of other packages still work as this package uses them; a release that changes one fails here first."""

from __future__ import annotations

import ast
import datetime
import importlib.util
import inspect
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import reductions

import megatron_dypo
from megatron_dypo.mcore.compat.checkpoint_files import STORAGE_INFO, file_view, storage_info
from megatron_dypo.mcore.compat.core_version import CORE
from megatron_dypo.mcore.compat.groups import NEW_GROUP, WORLD, join_as_rank_0, separate_group
from megatron_dypo.mcore.compat.private_name import PrivateName
from tests.support.private_names import all_private_names
from tests.support.private_uses import defined_names, private_uses

ROOT = Path(megatron_dypo.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT / "mcore" / "compat")

HANDLE = [
    "handle",
    "storage_size_bytes",
    "storage_offset_bytes",
    "ref_counter_handle",
    "ref_counter_offset",
    "event_handle",
    "event_sync_required",
]
"""The values by which torch's own code passes on a shared storage, after the GPU's number."""


NAMES = all_private_names()


def test_the_names_are_found() -> None:
    assert {"groups.NEW_GROUP", "results_queue.RESULTS_QUEUE", "without_te.SET_MAIN_PARAM"} <= NAMES.keys()


@pytest.mark.parametrize("private", NAMES.values(), ids=NAMES)
def test_every_private_name_is_there_and_says_where(private: PrivateName) -> None:
    is_there = private.package != "megatron-bridge" or importlib.util.find_spec("megatron.bridge") is not None
    if is_there and not private.needs_te:  # tests/unit/te gets those
        private.get()
    repository, version, where = private.source.split(maxsplit=2)
    assert repository in ("pytorch/pytorch", "NVIDIA/Megatron-LM", "NVIDIA-NeMo/Megatron-Bridge")
    assert version.lstrip("core_v")[0].isdigit()
    assert ".py:" in where


def test_a_private_name_is_used_in_the_folder_alone() -> None:
    sources = {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in FILES}
    own = set[str]().union(*map(defined_names, sources.values()))
    uses = [f"{path}:{use}" for path, source in sources.items() for use in private_uses(source, own)]
    assert not uses, "give it a PrivateName in mcore/compat/"


@pytest.mark.parametrize(
    "source",
    [
        "from torch.distributed.checkpoint.filesystem import _StorageInfo",
        "import torch._dynamo",
        "optimizer._copy_main_params_to_model_params()",
        "megatron.core.x._queue = 1",
        "getattr(tensor, '_base')",
        "from megatron.core.models.gpt import GPTModel\nclass A(GPTModel):\n    def _postprocess(self): ...",
        "class A:\n    def run(self):\n        return super()._step()",
    ],
)
def test_a_new_use_is_found(source: str) -> None:
    assert len(private_uses(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "class A:\n    def __init__(self): self._x = 1\ndef f(a): return a._x",
        "from torch.nn import Module\nclass A(Module):\n    def _own_name(self): return self._own_name()",
        "import os\nos._exit(0)",
        "for _ in (): pass\nx.__dict__",
    ],
)
def test_own_private_names_are_no_use(source: str) -> None:
    assert private_uses(source) == []


def test_a_group_is_made_by_the_arguments_that_we_give() -> None:
    parameters = list(inspect.signature(NEW_GROUP.get()).parameters.values())
    positional = ["group_size", "group_rank", "global_ranks_in_group", "backend", "store"]
    assert [parameter.name for parameter in parameters[:5]] == positional
    assert {"group_name", "backend_options", "timeout"} <= {parameter.name for parameter in parameters[5:]}
    given = {*positional, "group_name"}
    needed = {parameter.name for parameter in parameters if parameter.default is inspect.Parameter.empty}
    assert needed <= given


def test_the_group_that_is_made_broadcasts_from_rank_0() -> None:
    store = dist.HashStore()
    group = join_as_rank_0(store, 1, "alone", "gloo", datetime.timedelta(seconds=20))
    value = torch.tensor([7.0])
    dist.broadcast(value, src=0, group=group)
    assert (value.item(), WORLD.get().pg_group_ranks[group]) == (7.0, {0: 0})
    dist.destroy_process_group(group)


def test_a_separate_group_stands_outside_the_registries() -> None:
    group = separate_group(dist.HashStore(), 0, 1, datetime.timedelta(seconds=20), ctas=1)
    assert group not in WORLD.get().pg_group_ranks
    assert callable(group.send)
    assert callable(group.recv)


def _words(*nodes: ast.expr) -> list[str]:
    """Return the names in ``nodes``, in the order of the code."""
    return re.findall(r"\w+", ", ".join(map(ast.unparse, nodes)))


def test_a_shared_storage_is_opened_with_what_sharing_it_returned():
    """The tuple is opaque: torch's own code must pass it on in the order in which it got it."""
    shared = [
        _words(node.targets[0])
        for node in ast.walk(ast.parse(inspect.getsource(reductions.reduce_tensor)))
        if isinstance(node, ast.Assign) and "_share_cuda_" in ast.unparse(node.value)
    ]
    opened = [
        _words(*node.args)
        for node in ast.walk(ast.parse(inspect.getsource(reductions.rebuild_cuda_tensor)))
        if isinstance(node, ast.Call) and "_new_shared_cuda" in ast.unparse(node.func)
    ]
    assert [names[1:] for names in shared] == [HANDLE]
    assert [[name.removeprefix("storage_") for name in names] for names in opened] == [
        [name.removeprefix("storage_") for name in ["device", *HANDLE]]
    ]


def test_a_stored_chunk_has_file_start_and_length() -> None:
    info = storage_info("__0_0.distcp", 7, 11)
    assert isinstance(info, STORAGE_INFO.get())
    assert (info.relative_path, info.offset, info.length) == ("__0_0.distcp", 7, 11)


def test_a_tensor_is_loaded_from_the_middle_of_a_file() -> None:
    stream = io.BytesIO()
    stream.write(b"before")
    torch.save(torch.arange(5), stream)
    length = stream.tell() - 6
    stream.write(b"after")
    loaded = torch.load(file_view(stream, 6, length), weights_only=True)
    assert loaded.tolist() == [0, 1, 2, 3, 4]


def test_megatrons_writer_takes_the_queue_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_dypo.mcore.compat.results_queue import use_results_queue

    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    queue = object()
    use_results_queue(queue)
    get_queue = "_get_write_results_queue" if CORE < (0, 17) else "get_write_results_queue"
    assert getattr(filesystem_async, get_queue)() is queue


def test_an_optimizer_step_ends_with_the_copies_that_we_make() -> None:
    """With MXFP8 the main parameters are copied into the buffer, otherwise into the model."""
    from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer

    source = inspect.getsource(MixedPrecisionOptimizer.step_with_ready_grads)
    first, second = (source.index(f"self._copy_main_params_to_{place}()") for place in ("param_buffer", "model_params"))
    assert source.index("if self.config.reuse_grad_buf_for_mxfp8_param_ag") < first < second


def test_megatron_makes_its_outputs_and_its_balance_by_the_methods_that_we_override() -> None:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.moe.router import TopKRouter

    assert "self._postprocess(" in inspect.getsource(GPTModel.forward)
    assert "self._apply_aux_loss(" in inspect.getsource(TopKRouter.routing)


@pytest.mark.parametrize(
    "changed", [{"name": "_gone"}, {"name": "Backend._gone"}, {"oldest": "99.1"}, {"takes": ("name", "gone")}]
)
def test_a_changed_name_and_an_old_package_are_said_with_versions_and_source(changed: dict[str, str]) -> None:
    fields = {"package": "torch", "module": "torch.distributed", "name": "Backend", "source": "here:1", "oldest": "2.0"}
    private = PrivateName(**{**fields, **changed})  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=rf"torch {torch.__version__.split('+')[0]}.*{private.name}.*here:1"):
        private.get()


@pytest.mark.parametrize("module", ["groups", "storages"])
def test_the_files_of_a_refit_are_imported_without_megatron(module: str) -> None:
    """SGLang imports them so."""
    code = f"import sys; sys.modules['megatron'] = None; import megatron_dypo.mcore.compat.{module}"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("module", ["convert", "export_run", "roundtrip"])
def test_checkpoints_are_converted_without_megatron(module: str) -> None:
    code = f"import sys; sys.modules['megatron'] = None; import megatron_dypo.mcore.checkpoints.{module}"
    subprocess.run([sys.executable, "-c", code], check=True)
