"""Reading an HF safetensors folder slice by slice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_dypo.architecture import Architecture
from megatron_dypo.weights.families.registry import family_rows, is_redundant_hf_name
from megatron_dypo.weights.quantized_names import is_scale

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of weights, by their names in safetensors headers."""


class HFReader:
    """The tensors of an HF folder: opened at once, read only where they are sliced.

    Raises:
        ValueError: no safetensors in the folder, a file that the index names is missing or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files: dict[str, Any] = {}
        self._file_of = self._locate()

    def _locate(self) -> dict[str, str]:
        index = self.path / INDEX_NAME
        if index.is_file():
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
            for name, file in weight_map.items():
                if name not in self._open(file).keys():  # noqa: SIM118, a safetensors handle is no mapping
                    raise ValueError(f"{self.path / file}: tensor {name} is missing, although {INDEX_NAME} names it")
            return weight_map
        if (self.path / SINGLE_NAME).is_file():
            return dict.fromkeys(self._open(SINGLE_NAME).keys(), SINGLE_NAME)
        raise ValueError(f"{self.path}: neither {INDEX_NAME} nor {SINGLE_NAME} is there; weights must be safetensors")

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self.path / file
            if not path.is_file():
                raise ValueError(f"{path}: no such file, although {INDEX_NAME} names it")
            try:
                self._files[file] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path}: not a safetensors file: {error}") from error
        return self._files[file]

    def names(self) -> list[str]:
        """Names of all tensors, in the index's order."""
        return list(self._file_of)

    def slice(self, name: str) -> Any:
        """A lazy view of one tensor: indexing it reads that part."""
        if name not in self._file_of:
            raise ValueError(f"{self.path}: tensor {name} is missing")
        return self._open(self._file_of[name]).get_slice(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Type of one tensor; ValueError for one that is no floating-point weight."""
        dtype = self.slice(name).get_dtype()
        if dtype not in DTYPES:
            raise ValueError(f"{self.path}: tensor {name} has type {dtype}: must be one of {', '.join(DTYPES)}")
        return DTYPES[dtype]

    def check_complete(self, arch: Architecture) -> None:
        """Hold the folder against the family's table: no tensor missing, unknown, misshapen or of an odd type.

        Raises:
            ValueError: names every offending tensor, or the first scale of weights that are quantised.
        """
        if scale := next(filter(is_scale, self._file_of), None):
            raise ValueError(
                f"{self.path}: tensor {scale}: is a scale of quantised weights, which cannot be trained or converted; "
                "name the folder that they were made from"
            )
        expected: dict[str, tuple[int, ...]] = {}
        for row in family_rows(arch):
            expected.update(zip(row.hf, row.rule.hf_shapes(arch), strict=True))
        problems = [f"tensor {name} is missing" for name in expected if name not in self._file_of]
        for name in self._file_of:
            if name in expected:
                shape = self.shape(name)
                if shape != expected[name]:
                    problems.append(f"tensor {name} has shape {shape}, config.json asks for {expected[name]}")
                self.dtype(name)
            elif not is_redundant_hf_name(name, arch):
                problems.append(f"tensor {name}: no rule of family {arch.family!r} matches it")
        if problems:
            raise ValueError(f"{self.path}: " + "; ".join(problems))
