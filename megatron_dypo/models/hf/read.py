"""Reading an HF safetensors folder slice by slice."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch

from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.families.llama import OUTPUT, TIED_OUTPUT
from megatron_dypo.models.families.registry import family_rows, is_redundant_hf_name
from megatron_dypo.models.hf.files import SafetensorsFiles
from megatron_dypo.models.quantized.names import is_scale

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of weights, by their names in safetensors headers."""

_ROWS = 4096
"""Rows of a matrix that are compared at a time."""
_log = logging.getLogger(__name__)


class HFReader:
    """The tensors of an HF folder: opened at once, read only where they are sliced.

    Raises:
        ValueError: as :class:`~megatron_dypo.models.hf.files.SafetensorsFiles`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files = SafetensorsFiles(self.path)

    def names(self) -> list[str]:
        """Names of all tensors, in the index's order."""
        return list(self._files.file_of)

    def slice(self, name: str) -> Any:
        """A lazy view of one tensor: indexing it reads that part."""
        if name not in self._files.file_of:
            raise ValueError(f"{self.path}: tensor {name} is missing")
        return self._files.slice(name)

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
        file_of = self._files.file_of
        if scale := next(filter(is_scale, file_of), None):
            raise ValueError(
                f"{self.path}: tensor {scale}: is a scale of quantised weights, which cannot be trained or converted; "
                "name the folder that they were made from"
            )
        expected: dict[str, tuple[int, ...]] = {}
        for row in family_rows(arch):
            expected.update(zip(row.hf, row.rule.hf_shapes(arch), strict=True))
        problems = [f"tensor {name} is missing" for name in expected if name not in file_of]
        for name in file_of:
            if name in expected:
                shape = self.shape(name)
                if shape != expected[name]:
                    problems.append(f"tensor {name} has shape {shape}, config.json asks for {expected[name]}")
                self.dtype(name)
            elif not is_redundant_hf_name(name, arch):
                problems.append(f"tensor {name}: no rule of family {arch.family!r} matches it")
        if problems:
            raise ValueError(f"{self.path}: " + "; ".join(problems))
        self._say_what_is_passed_over(arch)

    def _say_what_is_passed_over(self, arch: Architecture) -> None:
        """Warn, once in a process, of an output layer in the file that a tied model does not use."""
        (output,), (embedding,) = OUTPUT.hf, TIED_OUTPUT.hf
        if not arch.tied_embeddings or output not in self._files.file_of or self._equal(output, embedding):
            return
        warn_once(
            f"{self.path / self._files.file_of[output]}: tensor {output} differs from {embedding}, and is passed over: "
            "tie_word_embeddings=true in config.json makes the embedding the output layer (transformers 5 would use "
            "the tensor; set tie_word_embeddings to false if it was trained)"
        )

    def _equal(self, name: str, other: str) -> bool:
        """Whether two matrices are the same; a part of each is in memory at a time."""
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
