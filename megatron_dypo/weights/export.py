"""Exporting a model under training as an HF folder, each pipeline stage writing its own files at the same time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron_dypo.architecture import Architecture
from megatron_dypo.progress import progress
from megatron_dypo.weights.families.registry import match
from megatron_dypo.weights.folders import commit_folder, partial_path, start_folder
from megatron_dypo.weights.gather import iter_hf_tensors
from megatron_dypo.weights.hf_write import MAX_FILE_BYTES, TensorSpec, finish_hf_folder, write_parts


def export_hf(
    named_params: Iterable[tuple[str, Tensor]],
    arch: Architecture,
    *,
    tp_rank: int,
    tp_size: int,
    tp_group: dist.ProcessGroup | None,
    pp_rank: int,
    pp_size: int,
    control_group: dist.ProcessGroup | None,
    write: bool,
    out_dir: str | Path,
    reference_hf_path: str | Path,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write the parameters of one replica as the HF folder ``out_dir``, which appears whole, replacing an older one.

    Collective over ``tp_group`` and over ``control_group``: all tensor × pipeline ranks of one replica, on the CPU
    (gloo), reaching one file system. Its first rank makes the folder and names it. Ranks of other replicas pass
    ``write=False`` and return at once. Tensors are gathered over TP one by one, never over PP. Names of parameters
    carry the global layer index. Configuration and tokenizer come from ``reference_hf_path``.

    Raises:
        ValueError: a parameter that no rule matches, before anything is written.
    """
    if not write:
        return
    params = list(named_params)
    specs = _specs(params, arch)
    out_dir, is_leader = Path(out_dir), tp_rank == 0 and pp_rank == 0
    if is_leader:
        start_folder(out_dir)
    _barrier(control_group, tp_size * pp_size)
    tensors = iter_hf_tensors(params, arch, tp_rank, tp_size, tp_group)
    total = sum(spec.num_bytes for spec in specs)
    with progress(total, f"export of stage {pp_rank}", "bytes", enabled=is_leader) as bar:
        own = specs if tp_rank == 0 else []  # other ranks only take part in the gathers
        write_parts(partial_path(out_dir), f"stage-{pp_rank:05d}", own, tensors, bar, max_file_bytes)
    _barrier(control_group, tp_size * pp_size)
    if is_leader:
        finish_hf_folder(partial_path(out_dir), Path(reference_hf_path))
        commit_folder(partial_path(out_dir), out_dir)
    _barrier(control_group, tp_size * pp_size)


def _specs(params: list[tuple[str, Tensor]], arch: Architecture) -> list[TensorSpec]:
    """What :func:`iter_hf_tensors` yields for these parameters."""
    return [
        TensorSpec(hf_name, param.dtype, shape)
        for name, param in params
        if not (row := match(name, arch)).is_copy
        for hf_name, shape in zip(row.hf, row.rule.hf_shapes(arch), strict=True)
    ]


def _barrier(group: dist.ProcessGroup | None, num_ranks: int) -> None:
    if num_ranks > 1:
        dist.barrier(group=group)
