"""Weights between an HF folder and the chunks, by the mappings of Megatron-Bridge."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dypo.mcore.bridged.provider import open_bridge
from megatron_dypo.mcore.chunks import unwrap
from megatron_dypo.mcore.param_gather import finish_gather
from megatron_dypo.models.hf.read import HFReader
from megatron_dypo.models.hf.write import TensorSpec
from megatron_dypo.parallel.groups import MeshRank

_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_ROTARY_BUFFER = ".rotary_emb.inv_freq"


class BridgedWeights:
    """The weights of a model without a name table: read into this rank's chunks, and given back as whole HF tensors.

    All ranks make it together.

    Raises:
        ValueError: a parameter has no mapping, its tensor is not in the HF folder, or no mapping reads a tensor of it.
    """

    def __init__(self, hf_path: str | Path, chunks: Sequence[torch.nn.Module], layout: MeshRank) -> None:
        self._bridge, self._reader, self._chunks = open_bridge(hf_path), HFReader(hf_path), list(chunks)
        self._layout = layout
        self._dtype = next(chunks[0].parameters()).dtype
        self._tasks = self._bridge.get_conversion_tasks(self._chunks)
        self._names = self._checked_names()

    def load(self) -> None:
        """Fill the chunks from the HF folder. Collective over the world. One tensor at a time is whole."""
        self._bridge.load_hf_weights(self._chunks)

    def specs(self) -> list[TensorSpec]:
        """List the tensors that :meth:`tensors` yields here: all on the global leader, none on other ranks."""
        if not self._layout.is_global_leader:
            return []
        return [TensorSpec(name, self._dtype, self._reader.shape(name)) for name in self._names]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield HF names and tensors, one at a time, on the global leader; nothing on other ranks.

        Collective over the pipeline and tensor-parallel ranks of a replica. All must exhaust the iterator.
        """
        finish_gather(self._chunks)
        exported = self._bridge.export_hf_weights(
            self._chunks, cpu=False, show_progress=False, conversion_tasks=self._tasks
        )
        with torch.no_grad():
            for name, tensor in exported:
                if self._layout.is_global_leader:
                    yield name, tensor.detach()

    def _checked_names(self) -> list[str]:
        """Return the HF names of the tensors in the order in which they are exported."""
        problems = [f"parameter {number} has no mapping" for number, task in enumerate(self._tasks) if task is None]
        held, names = self._reader.names(), []
        for task in filter(None, self._tasks):
            names += _hf_names(task)
            if names[-1] == _EMBEDDING and self._is_tied and _OUTPUT in held:
                names.append(_OUTPUT)
            if task.param_weight is not None:
                problems += self._misfit(task)
        problems += [f"tensor {name} is missing" for name in names if name not in held]
        problems += [
            f"tensor {name}: no mapping reads it"
            for name in sorted(set(held) - set(names))
            if not name.endswith(_ROTARY_BUFFER)
        ]
        if problems:
            raise ValueError(f"{self._reader.path}: with model.family=bridge: " + "; ".join(problems))
        return names

    def _misfit(self, task: Any) -> list[str]:
        """Say so if the parameter of all tensor-parallel ranks together is not as large as its HF tensors."""
        names = _hf_names(task)
        if any(name not in self._reader.names() for name in names):
            return []
        wanted = sum(math.prod(self._reader.shape(name)) for name in names)
        is_split = getattr(task.param_weight, "tensor_model_parallel", False)
        held = task.param_weight.numel() * (self._layout.tensor if is_split else 1)
        return [] if held == wanted else [f"{', '.join(names)}: {wanted} numbers, the model has {held}"]

    @property
    def _is_tied(self) -> bool:
        model: Any = unwrap(self._chunks[0])
        return bool(model.share_embeddings_and_output_weights)


def _hf_names(task: Any) -> list[str]:
    found = task.mapping.hf_param
    return [found] if isinstance(found, str) else list(found.values())
