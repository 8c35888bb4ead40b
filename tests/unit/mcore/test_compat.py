"""Private names of other packages are still as we use them: a new release that changes one fails here first."""

from __future__ import annotations

import ast
import datetime
import inspect
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import reductions

from megatron_dypo.mcore import compat
from megatron_dypo.mcore.compat import NEW_GROUP, OPEN_STORAGE, SHARE_STORAGE, WORLD, PrivateName

NAMES = [NEW_GROUP, WORLD, SHARE_STORAGE, OPEN_STORAGE]

HANDLE = [
    "handle",
    "storage_size_bytes",
    "storage_offset_bytes",
    "ref_counter_handle",
    "ref_counter_offset",
    "event_handle",
    "event_sync_required",
]
"""A shared storage as torch's own code passes it on, after the GPU's number."""


@pytest.mark.parametrize("private", NAMES, ids=lambda private: private.name)
def test_every_private_name_is_there(private):
    assert private.get() is not None


def test_a_group_is_made_by_the_arguments_that_we_give():
    parameters = list(inspect.signature(NEW_GROUP.get()).parameters.values())
    positional = ["group_size", "group_rank", "global_ranks_in_group", "backend", "store"]
    assert [parameter.name for parameter in parameters[:5]] == positional
    assert {"group_name", "backend_options", "timeout"} <= {parameter.name for parameter in parameters[5:]}
    given = {*positional, "group_name"}
    needed = {parameter.name for parameter in parameters if parameter.default is inspect.Parameter.empty}
    assert needed <= given


def test_the_group_that_is_made_broadcasts_from_rank_0():
    store = dist.HashStore()
    group = compat.join_as_rank_0(store, 1, "alone", "gloo", datetime.timedelta(seconds=20))
    value = torch.tensor([7.0])
    dist.broadcast(value, src=0, group=group)
    assert (value.item(), WORLD.get().pg_group_ranks[group]) == (7.0, {0: 0})
    dist.destroy_process_group(group)


def test_a_separate_group_stands_outside_the_registries():
    group = compat.separate_group(dist.HashStore(), 0, 1, datetime.timedelta(seconds=20))
    assert group not in WORLD.get().pg_group_ranks
    assert callable(group.send)
    assert callable(group.recv)


def _words(*nodes: ast.expr) -> list[str]:
    """Return the names in ``nodes``, in the order of the code."""
    return re.findall(r"\w+", ", ".join(map(ast.unparse, nodes)))


def test_a_shared_storage_is_opened_with_what_sharing_it_returned():
    """The tuple is opaque to us: torch's own code must pass it on in the order in which it got it."""
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


@pytest.mark.parametrize("changed", [{"name": "_gone"}, {"name": "Backend._gone"}, {"oldest": "99.1"}])
def test_a_missing_name_and_an_old_package_are_said_with_versions_and_source(changed):
    fields = {"package": "torch", "module": "torch.distributed", "name": "Backend", "source": "here:1", "oldest": "2.0"}
    private = PrivateName(**{**fields, **changed})
    with pytest.raises(RuntimeError, match=rf"torch {torch.__version__.split('+')[0]}.*{private.name}.*here:1"):
        private.get()


def test_the_file_is_imported_without_megatron():
    """As inside SGLang."""
    code = "import sys; sys.modules['megatron'] = None; import megatron_dypo.mcore.compat"
    subprocess.run([sys.executable, "-c", code], check=True)
