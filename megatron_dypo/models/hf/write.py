"""Writing an HF safetensors folder tensor by tensor.

A safetensors file begins with the table of its tensors. So names, types and shapes are planned before the first byte of
data is written, and only one tensor at a time is in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dypo.fs import durable_file
from megatron_dypo.json_text import parse_json
from megatron_dypo.metrics.progress import Progress
from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.hf.files import INDEX_NAME, SINGLE_NAME
from megatron_dypo.models.hf.json_file import read_json_object
from megatron_dypo.models.hf.read import DTYPES
from megatron_dypo.models.quantized.names import is_mxfp4, is_scale
from megatron_dypo.models.stacked_experts import part_of, stored_names, stored_shape

MAX_FILE_BYTES = 5_000_000_000

_QUANTIZED = "F8_E4M3"
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.float8_e4m3fn: _QUANTIZED}
_PART_SUFFIX = ".part"
_GENERATION = "generation_config.json"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_BESIDE = (
    _GENERATION,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "LICENSE*",
)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def stored_specs(specs: Sequence[TensorSpec], arch: Architecture) -> list[TensorSpec]:
    """Return the specs of the stored tensors, given those of the name table (``models/stacked_experts.py``)."""
    of_name = {spec.name: spec for spec in specs}
    dtypes = {part.stored: spec.dtype for spec in specs if (part := part_of(spec.name, arch))}
    return [
        of_name[name] if name in of_name else TensorSpec(name, dtypes[name], stored_shape(name, arch))
        for name in stored_names(of_name, arch)
    ]


def plan_files(specs: Iterable[TensorSpec], max_file_bytes: int) -> list[list[TensorSpec]]:
    """Divide ``specs`` into files, in order. A file has at most ``max_file_bytes``, or a single tensor."""
    files: list[list[TensorSpec]] = []
    room = 0
    for spec in specs:
        if not files or spec.num_bytes > room:
            files.append([])
            room = max_file_bytes
        files[-1].append(spec)
        room -= spec.num_bytes
    return files


def write_parts(
    folder: Path,
    stem: str,
    specs: Sequence[TensorSpec],
    tensors: Iterator[tuple[str, Tensor]],
    bar: Progress,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write the files of one writer. ``tensors`` must yield the tensors of ``specs`` in the same order.

    Several processes may write to one folder under different stems. The files are numbered in the order of their stems;
    :func:`finish_hf_folder` gives them their names. ``bar`` counts bytes.
    """
    for number, group in enumerate(plan_files(specs, max_file_bytes)):
        header, offset_of = _header(group)
        with durable_file(folder / f"{stem}-{number:05d}{_PART_SUFFIX}") as stream:
            stream.write(header)
            for spec in group:
                name, tensor = next(tensors)
                assert (name, tensor.dtype, tuple(tensor.shape)) == (spec.name, spec.dtype, spec.shape), spec
                stream.seek(len(header) + offset_of[name])
                stream.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
                bar.update(spec.num_bytes)
    assert next(tensors, None) is None, "more tensors than planned"


def finish_hf_folder(
    folder: Path,
    reference: Path,
    quantization_config: Mapping[str, Any] | None = None,
    stop_ids: Sequence[int] = (),
) -> None:
    """Name the parts as transformers expects, write the index, and add configuration and tokenizer.

    The files besides the weights come from ``reference``. ``config.json`` gets the dtype of the weights that are not
    quantised, and ``quantization_config`` for those that are. ``stop_ids`` are as in :func:`copy_beside`.
    """
    parts = sorted(folder.glob(f"*{_PART_SUFFIX}"))
    weight_map: dict[str, str] = {}
    total_bytes, dtypes = 0, set()
    for number, part in enumerate(parts, start=1):
        name = SINGLE_NAME if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        part.rename(folder / name)
        for tensor, entry in _read_header(folder / name).items():
            weight_map[tensor] = name
            total_bytes += entry["data_offsets"][1] - entry["data_offsets"][0]
            if entry["dtype"] != _QUANTIZED and not is_scale(tensor):
                dtypes.add(DTYPES[entry["dtype"]])
    if len(parts) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        _write_json(folder / INDEX_NAME, index)
    copy_beside(reference, folder, dtypes.pop() if len(dtypes) == 1 else None, quantization_config, stop_ids)


def copy_beside(
    source: Path,
    target: Path,
    dtype: torch.dtype | None = None,
    quantization_config: Mapping[str, Any] | None = None,
    stop_ids: Sequence[int] = (),
) -> None:
    """Copy the files of an HF folder besides its weights: configurations, tokenizer, chat template, licence.

    Args:
        dtype: of the weights, for ``config.json``, which then does not say MXFP4 either. None: as in ``source``.
        stop_ids: ids at which the model was trained to stop. ``eos_token_id`` of generation_config.json gets those that
            it lacks. Otherwise transformers would generate past the end of a response: the file of a base model does
            not name the end of a turn.
    """
    config = read_json_object(source / "config.json")
    if dtype is not None:
        # transformers 5 calls it dtype, 4 torch_dtype; both read the older name
        for name in [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]:
            config[name] = str(dtype).removeprefix("torch.")
    if quantization_config is not None:
        config["quantization_config"] = quantization_config
    elif is_mxfp4(config) and dtype is not None:
        del config["quantization_config"]
    _write_json(target / "config.json", config)
    for pattern in _BESIDE:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
    _add_stop_ids(source / _GENERATION, config, target / _GENERATION, stop_ids)


def _add_stop_ids(source: Path, config: Mapping[str, Any], target: Path, stop_ids: Sequence[int]) -> None:
    """Write generation_config.json with ``stop_ids`` added to ``eos_token_id``; do nothing if it has them all.

    A folder without the file gets one from ``config.json``, which transformers reads in its place.
    """
    found = read_json_object(source) if source.is_file() else {key: config[key] for key in _TOKEN_IDS if key in config}
    known = found.get("eos_token_id")
    known = known if isinstance(known, list) else [] if known is None else [known]
    if missing := [token_id for token_id in stop_ids if token_id not in known]:
        _write_json(target, {**found, "eos_token_id": [*known, *missing]})


def _header(specs: Sequence[TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """Return the header of a file, and the offset of each tensor after it, in the order of the safetensors library."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset_of: dict[str, int] = {}
    offset = 0
    for spec in sorted(specs, key=lambda spec: (-spec.dtype.itemsize, spec.name)):
        offset_of[spec.name] = offset
        offset += spec.num_bytes
        data_offsets = [offset - spec.num_bytes, offset]
        entries[spec.name] = {"dtype": _DTYPE_NAMES[spec.dtype], "shape": spec.shape, "data_offsets": data_offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the data
    return len(text).to_bytes(8, "little") + text, offset_of


def _read_header(path: Path) -> dict[str, dict[str, Any]]:
    with path.open("rb") as stream:
        entries: dict[str, dict[str, Any]] = parse_json(stream.read(int.from_bytes(stream.read(8), "little")))
    del entries["__metadata__"]
    return entries


def _write_json(path: Path, value: object) -> None:
    with durable_file(path) as stream:
        stream.write((json.dumps(value, indent=2, sort_keys=True) + "\n").encode())
