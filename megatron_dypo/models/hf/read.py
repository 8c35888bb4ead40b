"""Reading an HF safetensors folder slice by slice."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch

from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.families.llama import OUTPUT, TIED_OUTPUT
from megatron_dypo.models.families.registry import family_rows, is_carried_hf_name, is_redundant_hf_name
from megatron_dypo.models.hf.files import SafetensorsFiles
from megatron_dypo.models.hf.stacked import StackedExperts
from megatron_dypo.models.quantized.mxfp4 import BLOCK, BLOCKS, SCALES
from megatron_dypo.models.quantized.names import is_scale
from megatron_dypo.models.stacked_experts import find_part, part_of, stored_shape

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of weights, by their names in safetensors headers."""

_ROWS = 4096
"""Number of rows of a matrix that are compared at a time."""
_log = logging.getLogger(__name__)


class HFReader:
    """The tensors of an HF folder. All files are opened at once; slicing a tensor reads only the slice.

    Raises:
        ValueError: as in :class:`~megatron_dypo.models.hf.files.SafetensorsFiles`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files = SafetensorsFiles(self.path)
        self._stacked = StackedExperts(self._files)

    def names(self) -> list[str]:
        """Return the names of all tensors, in the index's order."""
        return list(self._files.file_of)

    def slice(self, name: str) -> Any:
        """Return a lazy view of one tensor. Indexing it reads that part."""
        if name not in self._files.file_of:
            part = find_part(name)
            if part is None or not self._stacked.holds(part):
                raise ValueError(f"{self.path}: tensor {name} is missing")
            return self._stacked.slice(part)
        return self._files.slice(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of one tensor. ValueError if it is no floating-point weight."""
        dtype = self.slice(name).get_dtype()
        if dtype not in DTYPES:
            raise ValueError(f"{self.path}: tensor {name} has type {dtype}: must be one of {', '.join(DTYPES)}")
        return DTYPES[dtype]

    def check_complete(self, arch: Architecture) -> None:
        """Compare the folder with the family's table: no tensor may be missing, unknown, misshapen or of a wrong type.

        Raises:
            ValueError: the message names every wrong tensor, or the first scale if weights are quantised.
        """
        file_of = self._files.file_of
        if scale := next(filter(is_scale, file_of), None):
            raise ValueError(
                f"{self.path}: tensor {scale}: is a scale of quantised weights, which cannot be trained or converted; "
                "name the folder from which they were made"
            )
        expected = self._expected(arch)
        problems = [f"tensor {name} is missing" for name in expected if name not in file_of]
        for name in file_of:
            if name in expected:
                shape = self.shape(name)
                if shape != expected[name]:
                    problems.append(f"tensor {name} has shape {shape}, config.json needs {expected[name]}")
                if not name.endswith((BLOCKS, SCALES)):
                    self.dtype(name)
                elif (kind := self.slice(name).get_dtype()) != "U8":
                    problems.append(f"tensor {name} has type {kind}, MXFP4 needs U8")
            elif not is_redundant_hf_name(name, arch) and not is_carried_hf_name(name, arch):
                problems.append(f"tensor {name}: no rule of family {arch.family!r} matches it")
        if problems:
            raise ValueError(f"{self.path}: " + "; ".join(problems))
        self._say_what_is_passed_over(arch)

    def _expected(self, arch: Architecture) -> dict[str, tuple[int, ...]]:
        """Return the tensors of the folder and their shapes: those of the table, with the stored ones of experts."""
        expected: dict[str, tuple[int, ...]] = {}
        for row in family_rows(arch):
            for name, shape in zip(row.hf, row.rule.hf_shapes(arch), strict=True):
                part = part_of(name, arch)
                if part is None:
                    expected[name] = shape
                elif part.stored + BLOCKS in self._files.file_of:
                    experts, inputs, outputs = stored_shape(part.stored, arch)
                    expected[part.stored + BLOCKS] = (experts, outputs, inputs // BLOCK, BLOCK // 2)
                    expected[part.stored + SCALES] = (experts, outputs, inputs // BLOCK)
                else:
                    expected[part.stored] = stored_shape(part.stored, arch)
        return expected

    def _say_what_is_passed_over(self, arch: Architecture) -> None:
        """Warn, once in a process, if the files have a different output layer that a tied model does not use."""
        (output,), (embedding,) = OUTPUT.hf, TIED_OUTPUT.hf
        if not arch.tied_embeddings or output not in self._files.file_of or self._equal(output, embedding):
            return
        warn_once(
            f"{self.path / self._files.file_of[output]}: tensor {output} differs from {embedding}, and is ignored: "
            "tie_word_embeddings=true in config.json makes the embedding the output layer (transformers 5 would use "
            "the tensor; set tie_word_embeddings to false if it was trained)"
        )

    def _equal(self, name: str, other: str) -> bool:
        """Return whether two matrices are equal. Only a part of each is in memory at a time."""
        if self.shape(name) != self.shape(other) or self.dtype(name) != self.dtype(other):
            return False
        first, second, num_rows = self.slice(name), self.slice(other), self.shape(name)[0]
        return all(
            torch.equal(first[start : start + _ROWS], second[start : start + _ROWS])
            for start in range(0, num_rows, _ROWS)
        )


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, unless this process has said the same before."""
    _log.warning(message)
