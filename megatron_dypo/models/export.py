"""Export of a model under training as an HF folder. Each pipeline stage writes its own files at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron_dypo.fs import commit_folder, partial_path, start_folder
from megatron_dypo.metrics.progress import progress
from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.bridged import WholeWeights
from megatron_dypo.models.carried import find_carried, write_carried
from megatron_dypo.models.gather import (
    exhausted,
    in_table_order,
    iter_hf_tensors,
    part_name,
    sent_params,
    written_specs,
)
from megatron_dypo.models.hf.write import MAX_FILE_BYTES, finish_hf_folder, write_parts
from megatron_dypo.models.quantized.folder import quantization_config, quantized_specs, quantized_tensors
from megatron_dypo.models.quantized.names import Quantization
from megatron_dypo.parallel.groups import MeshRank


def export_hf(
    named_params: Iterable[tuple[str, Tensor]],
    arch: Architecture,
    layout: MeshRank,
    *,
    out_dir: str | Path,
    reference_hf_path: str | Path,
    stop_ids: Sequence[int] = (),
    quantization: Quantization = "none",
    values: Callable[[Tensor], Tensor] = Tensor.detach,
    whole: WholeWeights | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write the policy as the HF folder ``out_dir``, which appears whole, replacing an older one.

    Every rank passes its parameters, named with global indices. Ranks whose parameters other ranks write return at
    once; the writers must share one file system. Tensors are gathered over TP (experts: over ETP) one by one, never
    over PP. Experts are written by the ranks that own them. Each writer quantises its tensors. Configuration,
    tokenizer and tensors that are not trained (:mod:`megatron_dypo.models.carried`) come from ``reference_hf_path``.

    Args:
        stop_ids: ids at which the policy stops; generation_config.json names them all. The global leader's count.
        whole: yields the tensors of a model without a name table, in place of ``named_params``; it is not quantised.
        values: returns a parameter, or a dequantised copy of one in FP8.

    Raises:
        ValueError: a parameter that no rule matches, before anything is written.
    """
    if not layout.is_sender:
        return
    if whole is not None:
        specs, tensors = whole.specs(), whole.tensors()
    else:
        params = in_table_order(sent_params(named_params, arch, layout), arch)
        specs = quantized_specs(written_specs(params, arch, layout), quantization)
        tensors = quantized_tensors(iter_hf_tensors(params, arch, layout, values), quantization)
    out_dir = Path(out_dir)
    if layout.is_global_leader:
        start_folder(out_dir)
    dist.barrier(group=layout.senders_group)
    total = sum(spec.num_bytes for spec in specs)
    title = f"export of stage {layout.pp_rank}"
    with exhausted(tensors), progress(total, title, "bytes", enabled=layout.is_global_leader) as bar:
        write_parts(partial_path(out_dir), part_name(layout), specs, tensors, bar, max_file_bytes)
    dist.barrier(group=layout.senders_group)
    if layout.is_global_leader:
        carried = find_carried(Path(reference_hf_path), arch)
        write_carried(partial_path(out_dir), carried, max_file_bytes=max_file_bytes, shows=True)
        config = quantization_config(arch, quantization)
        finish_hf_folder(partial_path(out_dir), Path(reference_hf_path), config, stop_ids)
        commit_folder(partial_path(out_dir), out_dir)
    dist.barrier(group=layout.senders_group)
