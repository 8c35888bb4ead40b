"""HF folder ↔ Megatron checkpoint, one tensor at a time, on the CPU, in one process."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_dypo.checks import require
from megatron_dypo.fs import new_folder
from megatron_dypo.mcore.checkpoints.manifest import Block, list_files, record_files, write_manifest
from megatron_dypo.mcore.checkpoints.torch_dist import HF_FOLDER, WEIGHTS_FOLDER, MCoreReader, weights_folder
from megatron_dypo.mcore.checkpoints.torch_dist_writer import MCoreWriter, StoredChunk
from megatron_dypo.mcore.checkpoints.verify import find_damage_of_weights, is_small
from megatron_dypo.metrics.progress import progress
from megatron_dypo.models.architecture import Architecture, load_architecture
from megatron_dypo.models.carried import find_carried, keep_carried, write_carried
from megatron_dypo.models.families.registry import (
    FINAL_NORM_STATE,
    family_rows,
    layer_of,
    match,
    stacked_shape,
    state_keys,
    stored_key,
)
from megatron_dypo.models.families.table import Row
from megatron_dypo.models.hf.read import HFReader
from megatron_dypo.models.hf.write import (
    MAX_FILE_BYTES,
    TensorSpec,
    copy_beside,
    finish_hf_folder,
    stored_specs,
    write_parts,
)
from megatron_dypo.models.layout_rules import check_tensor_parallel
from megatron_dypo.models.quantized.folder import quantization_config, quantized_specs, quantized_tensors
from megatron_dypo.models.quantized.names import Quantization
from megatron_dypo.models.quantized.refusals import require_quantizable
from megatron_dypo.models.rules import Chunk
from megatron_dypo.models.stacked_experts import stored_tensors
from megatron_dypo.parallel.mesh import Mesh


def hf_to_mcore(hf_path: Path, mcore_path: Path, *, mesh: Mesh, show_progress: bool = True) -> None:
    """Write the weights of an HF folder as a ``torch_dist`` checkpoint, in the files that the ranks of a mesh would
    write.

    Only tensor and pipeline sizes of ``mesh`` are used: one replica writes, and experts are whole. The checkpoint loads
    at any parallel sizes; in a run with these sizes only one rank reads each file. Types are kept. Configuration and
    tokenizer are kept in ``<mcore_path>/hf``, for a conversion back.

    Raises:
        ValueError: an HF tensor is missing, unknown or misshapen; a size does not divide the model; or ``mcore_path``
            is not vacant. Nothing is written then.
    """
    arch = load_architecture(hf_path)
    check_tensor_parallel(arch, mesh.tensor)
    stage_of = {layer: s for s in range(mesh.pipeline) for layer in mesh.layers_of(s, arch.num_layers)}
    reader = HFReader(hf_path)
    reader.check_complete(arch)
    carried = find_carried(hf_path, arch)
    rows = [row for row in family_rows(arch) if not row.is_copy]
    _check_types(rows, reader, arch)
    total = sum(math.prod(row.rule.stored_shape(arch, mesh.tensor)) * reader.dtype(row.hf[0]).itemsize for row in rows)
    with new_folder(mcore_path) as folder, progress(total, "HF → Megatron", "bytes", enabled=show_progress) as bar:
        writer = MCoreWriter(folder)
        for pp_rank in range(mesh.pipeline):
            stage = [row for row in rows if _stage(row, arch, stage_of) == pp_rank]
            for tp_rank in range(mesh.tensor):
                states = _states(stage, arch) if tp_rank == 0 else []
                chunks = (c for row in stage for c in _chunks(row, reader, arch, tp_rank, mesh.tensor))
                for num_bytes in writer.write_rank(pp_rank * mesh.tensor + tp_rank, states, chunks):
                    bar.update(num_bytes)
        writer.finish()
        (folder / HF_FOLDER).mkdir()
        copy_beside(hf_path, folder / HF_FOLDER)
        keep_carried(folder / HF_FOLDER, carried)
        write_manifest(folder, record_files(folder, list_files(folder)))


def mcore_to_hf(
    mcore_path: Path,
    hf_path: Path,
    *,
    hf_reference: Path | None = None,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    quantization: Quantization = "none",
    max_file_bytes: int = MAX_FILE_BYTES,
    show_progress: bool = True,
    overwrite: bool = False,
    verify: bool = True,
) -> None:
    """Write the weights of a ``torch_dist`` checkpoint as an HF folder that transformers and SGLang load.

    Configuration and tokenizer come from ``hf_reference``; the default is the folder that :func:`hf_to_mcore` or a
    training run left in the checkpoint. Optimizer states are not read. Types are kept, except those of weights that
    ``quantization`` puts into FP8; ``config.json`` then says so. The checkpoint itself tells how it is split; the sizes
    are only checked against the architecture. A checkpoint of a training run becomes the same files, byte for byte, as
    the run's own export of that step.

    Args:
        overwrite: replace the HF folder at ``hf_path``, once the new one is whole.
        verify: compare what is read with the checkpoint's manifest, if it has one.

    Raises:
        ValueError: a tensor is missing, unknown or misshapen; a file is not as the manifest says; there is no
            reference; or ``hf_path`` is not vacant. Nothing is written then.
    """
    weights = weights_folder(mcore_path)
    if verify:
        _require_as_written(weights, is_small)  # before anything parses them
    reader = MCoreReader(weights)
    reference = _reference(reader, hf_reference)
    arch = load_architecture(reference)
    require_quantizable(arch, quantization)
    check_tensor_parallel(arch, tensor_parallel)
    require(
        1 <= pipeline_parallel <= arch.num_layers,
        f"pipeline_parallel={pipeline_parallel}",
        f"must be from 1 to num_hidden_layers={arch.num_layers}",
    )
    reader.check_complete(arch)
    if verify:
        _require_as_written(weights, lambda block: not is_small(block) and reader.reads(block))
    carried = find_carried(reference, arch)
    parts = {
        stem: (rows, quantized_specs(_specs(rows, reader, arch), quantization))
        for stem, rows in _rows_by_part(reader, arch).items()
    }
    total = sum(spec.num_bytes for _, specs in parts.values() for spec in specs)
    with (
        new_folder(hf_path, replace=overwrite) as folder,
        progress(total, "Megatron → HF", "bytes", enabled=show_progress) as bar,
    ):
        for stem, (rows, specs) in parts.items():
            pairs = (pair for row in rows for pair in zip(row.hf, reader.read_hf(row, arch), strict=True))
            tensors = quantized_tensors(stored_tensors(pairs, arch), quantization)
            write_parts(folder, stem, specs, tensors, bar, max_file_bytes)
        write_carried(folder, carried, max_file_bytes=max_file_bytes, shows=show_progress)
        finish_hf_folder(folder, reference, quantization_config(arch, quantization))


def _require_as_written(weights: Path, wanted: Callable[[Block], bool]) -> None:
    if damage := find_damage_of_weights(weights, wanted=wanted):
        raise ValueError(damage)


def _specs(rows: list[Row], reader: MCoreReader, arch: Architecture) -> list[TensorSpec]:
    specs = [
        TensorSpec(name, reader.dtype(row, arch), shape)
        for row in rows
        for name, shape in zip(row.hf, row.rule.hf_shapes(arch), strict=True)
    ]
    return stored_specs(specs, arch)


def _rows_by_part(reader: MCoreReader, arch: Architecture) -> dict[str, list[Row]]:
    """Return the rows of each writer of an export: stem of its files → rows. Stems sort like the writers.

    The ranks that hold the weights write a run's export. The same ranks wrote its checkpoint.
    """
    rows = [row for row in family_rows(arch) if not row.is_copy]
    if not reader.is_of_run:
        return {"weights": rows}
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(f"rank-{reader.writer(_led(row, arch), arch):08d}", []).append(row)
    return parts


def _led(row: Row, arch: Architecture) -> Row:
    """Return the row whose first writer exports ``row``: for stacked experts that of the layer's first one."""
    if not row.is_expert or arch.experts is None or not arch.experts.is_stacked:
        return row
    head, experts, tail = row.mcore.partition(".local_experts.")
    return match(f"{head}{experts}0.{tail.partition('.')[2]}", arch)


def _reference(reader: MCoreReader, hf_reference: Path | None) -> Path:
    # π_ref in a run's checkpoint has no such folder; it uses that of the policy.
    beside = (reader.path / HF_FOLDER, reader.path.parent / WEIGHTS_FOLDER / HF_FOLDER)
    reference = hf_reference or next((folder for folder in beside if folder.is_dir()), beside[0])
    if not (reference / "config.json").is_file():
        raise ValueError(
            f"{reference}: no config.json; --hf-reference must name an HF folder with configuration and tokenizer"
        )
    return reference


def _check_types(rows: list[Row], reader: HFReader, arch: Architecture) -> None:
    """Require one type for all layers (and experts) of a parameter, since a checkpoint stacks them in one tensor."""
    type_of: dict[str, torch.dtype] = {}
    for row in rows:
        key = stored_key(row.mcore, arch)[0]
        for name in row.hf:
            dtype = reader.dtype(name)
            if type_of.setdefault(key, dtype) != dtype:
                raise ValueError(f"{reader.path}: tensor {name} is {dtype}, others of {key} are {type_of[key]}")


def _stage(row: Row, arch: Architecture, stage_of: Mapping[int, int]) -> int:
    layer = layer_of(row)
    if layer is not None:
        return stage_of[layer]
    return min(stage_of.values()) if row.mcore.startswith("embedding.") else max(stage_of.values())


def _states(stage: list[Row], arch: Architecture) -> list[str]:
    """Return the keys of the states of a stage's modules. The final norm is on the last stage."""
    layers = sorted({layer for row in stage if (layer := layer_of(row)) is not None})
    is_last = any(row.mcore == "decoder.final_layernorm.weight" for row in stage)
    return [key for layer in layers for key in state_keys(layer, arch)] + [FINAL_NORM_STATE] * is_last


def _chunks(row: Row, reader: HFReader, arch: Architecture, tp_rank: int, tp_size: int) -> Iterator[StoredChunk]:
    """Yield the chunks of a parameter that one rank writes. The first chunk reads the parameter, once for all.

    The first tensor-parallel rank writes whole experts, as in a run without expert tensor parallelism.
    """
    if row.is_expert:
        if tp_rank > 0:
            return
        tp_size = 1
    key, index = stored_key(row.mcore, arch)
    whole, dim = row.rule.stored_shape(arch, tp_size), row.rule.tp_dim or 0

    @functools.cache
    def shard() -> Tensor:
        return row.rule.shard([reader.slice(name) for name in row.hf], arch, tp_rank, tp_size)

    for chunk in row.rule.chunks(arch, tp_rank, tp_size):
        sizes, offsets = list(whole), [0] * len(whole)
        sizes[dim], offsets[dim] = chunk.length, chunk.stored_start
        yield StoredChunk(
            key=key,
            shape=(*stacked_shape(row.mcore, arch), *whole),
            offsets=(*index, *offsets),
            sizes=(*(1 for _ in index), *sizes),
            dtype=reader.dtype(row.hf[0]),
            read=functools.partial(_part, shard, dim, chunk),
        )


def _part(shard: Callable[[], Tensor], dim: int, chunk: Chunk) -> Tensor:
    return shard().narrow(dim, chunk.local_start, chunk.length)
