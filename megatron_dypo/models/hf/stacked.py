"""One expert's tensors, read from the tensor that an HF folder stores for all experts of a layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_dypo.models.hf.files import SafetensorsFiles
from megatron_dypo.models.quantized.mxfp4 import BLOCK, BLOCKS, SCALES, dequantize
from megatron_dypo.models.stacked_experts import Part


class StackedExperts:
    """The experts of a folder. The last matrix that was read is kept, since a gate and its value are in one."""

    def __init__(self, files: SafetensorsFiles) -> None:
        self._files = files
        self._last: tuple[tuple[str, int], Tensor] | None = None

    def holds(self, part: Part) -> bool:
        """Return whether the folder has the stored tensor, in MXFP4 or not."""
        return part.stored in self._files.file_of or self._is_mxfp4(part.stored)

    def slice(self, part: Part) -> ExpertSlice:
        """Return a lazy view of one expert's tensor."""
        return ExpertSlice(self, part)

    def shape(self, stored: str) -> tuple[int, ...]:
        """Return the shape of a stored tensor, [E, inputs, outputs] for matrices, also if it is in MXFP4."""
        if not self._is_mxfp4(stored):
            return tuple(self._files.slice(stored).get_shape())
        experts, outputs, num_blocks, _ = self._files.slice(stored + BLOCKS).get_shape()
        return experts, num_blocks * BLOCK, outputs

    def dtype(self, stored: str) -> str:
        """Return the type of a stored tensor's values, as safetensors names it."""
        return "BF16" if self._is_mxfp4(stored) else str(self._files.slice(stored).get_dtype())

    def read(self, part: Part) -> Tensor:
        """Return one expert's tensor."""
        key = (part.stored, part.expert)
        if self._last is None or self._last[0] != key:
            self._last = (key, self._load(*key))
        return part.take(self._last[1])

    def _load(self, stored: str, expert: int) -> Tensor:
        one = slice(expert, expert + 1)
        if not self._is_mxfp4(stored):
            matrix: Tensor = self._files.slice(stored)[one][0]
            return matrix
        blocks, scales = (self._files.slice(stored + suffix)[one][0] for suffix in (BLOCKS, SCALES))
        return dequantize(blocks, scales).T

    def _is_mxfp4(self, stored: str) -> bool:
        return stored + BLOCKS in self._files.file_of


class ExpertSlice:
    """A lazy view of one expert's tensor, with the methods of a safetensors slice. Indexing it reads the expert."""

    def __init__(self, experts: StackedExperts, part: Part) -> None:
        self._experts, self._part = experts, part

    def get_shape(self) -> list[int]:
        """Return the shape of the expert's tensor."""
        _, *sizes = self._experts.shape(self._part.stored)
        sizes[-1] = len(range(*self._part.columns.indices(sizes[-1])))
        return sizes[::-1]

    def get_dtype(self) -> str:
        """Return the type of its values."""
        return self._experts.dtype(self._part.stored)

    def __getitem__(self, index: Any) -> Tensor:
        return self._experts.read(self._part)[index]
