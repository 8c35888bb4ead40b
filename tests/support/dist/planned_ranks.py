"""Run the ranks of planned refits between stand-ins. They return plain data, which the tests judge."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_dypo.models.architecture import Architecture
from megatron_dypo.parallel.mesh import Mesh
from tests.support.dist.spawn import join_world
from tests.support.fake_control import KEY
from tests.support.refit_standins import held_names, plain_layout, shard

BUCKET_MIB = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refit:
    """The refits of one rank, and their settings."""

    arch: Architecture
    axes: Mesh
    urls: tuple[str, ...]
    kind: str
    dtype: torch.dtype = torch.float32
    verify: str = "full"
    quantize: str = "none"
    deadline_s: float = 60.0
    seeds: tuple[int, ...] = (1, 2)
    """Seeds of the models, one refit for each."""
    prepare: Callable[[], None] | None = None
    """Runs first on each rank, for example to make it misbehave."""


class Allocations(TorchDispatchMode):
    """The largest memory that any operator asked for, in bytes, and the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = (0, "")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, (made.untyped_storage().nbytes(), str(func)))
        return result

    @contextlib.contextmanager
    def in_all_threads(self) -> Iterator[None]:
        """Enter a dispatch mode, which holds for one thread, in this thread and in new threads of the block."""
        mode, plain = self, threading.Thread

        class RecordedThread(threading.Thread):
            def run(self) -> None:
                with mode:
                    super().run()

        threading.Thread = RecordedThread  # type: ignore[misc]
        try:
            with mode:
                yield
        finally:
            threading.Thread = plain  # type: ignore[misc]


def rank_refit(refit: Refit) -> list[dict[str, Any]]:
    """Make one refit for each seed; return the result of each."""
    from megatron_dypo.config.refit import RefitConfig
    from megatron_dypo.refit.lockstep import RefitError
    from megatron_dypo.refit.refitter import Refitter

    if refit.prepare is not None:
        refit.prepare()
    join_world()  # its barrier imports a large part of torch, which must not count as part of a refit
    layout = plain_layout(refit.axes, dist.get_rank())
    params: dict[str, Any] = dict.fromkeys(held_names(refit.arch, refit.axes, layout))
    config = RefitConfig(
        transport=refit.kind,  # type: ignore[arg-type]
        verify=refit.verify,  # type: ignore[arg-type]
        quantize=refit.quantize,  # type: ignore[arg-type]
        bucket_mib=BUCKET_MIB,
        deadline_s=refit.deadline_s,
    )
    folder = Path("unused")
    refitter = Refitter(
        layout,
        refit.arch,
        lambda: params.items(),
        urls=refit.urls,
        api_key=KEY,
        config=config,
        run_dir=folder,
        hf_reference=folder,
    )
    outcomes = []
    for version, seed in enumerate(refit.seeds):
        params.update({name: shard(name, refit.arch, layout, seed, refit.dtype) for name in params})
        allocations, error, num_bytes = Allocations(), "", 0
        try:
            with allocations.in_all_threads():
                num_bytes = refitter.refit(version).bytes
        except RefitError as caught:
            error = str(caught)
        outcomes.append({"error": error, "bytes": num_bytes, "largest": allocations.largest})
    refitter.close()
    dist.destroy_process_group()
    return outcomes
