"""Experts that an HF folder stores in one tensor for all experts of a layer, as gpt-oss's does.

The name table knows the tensors of each expert, with outputs before inputs as in a linear layer. Beside them stand the
stored tensors, for E experts of I channels and H hidden channels:

    experts.E.gate_proj.weight, experts.E.up_proj.weight [I, H]   experts.gate_up_proj       [E, H, 2I], alternating
    experts.E.gate_proj.bias,   experts.E.up_proj.bias   [I]      experts.gate_up_proj_bias  [E, 2I], alternating
    experts.E.down_proj.weight                           [H, I]   experts.down_proj          [E, I, H]
    experts.E.down_proj.bias                             [H]      experts.down_proj_bias     [E, H]

Source: ``GptOssExperts`` of transformers (``models/gpt_oss/modeling_gpt_oss.py``).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dypo.models.architecture import Architecture

_PART = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.(weight|bias)")


@dataclass(frozen=True)
class Part:
    """The place of one expert's tensor in a stored tensor."""

    stored: str
    """Name of the stored tensor."""
    expert: int
    columns: slice
    """Entries of the last axis of the stored tensor."""
    is_matrix: bool

    def take(self, of_expert: Tensor) -> Tensor:
        """Return the expert's tensor, a view, from all that the stored tensor has of the expert."""
        view = of_expert[..., self.columns]
        return view.T if self.is_matrix else view


def part_of(name: str, arch: Architecture) -> Part | None:
    """Return the place of a tensor of the name table in a stored tensor; None if it is stored as it is."""
    if arch.experts is None or not arch.experts.is_stacked:
        return None
    return find_part(name)


@functools.lru_cache(maxsize=1 << 16)
def find_part(name: str) -> Part | None:
    """Return the place that a tensor of the name table has if experts are stacked; None if it is none of an expert."""
    found = _PART.fullmatch(name)
    if found is None:
        return None
    prefix, expert, projection, kind = found.groups()
    columns = {"gate": slice(0, None, 2), "up": slice(1, None, 2), "down": slice(None)}[projection]
    stored = "down_proj" if projection == "down" else "gate_up_proj"
    suffix = "" if kind == "weight" else "_bias"
    return Part(f"{prefix}{stored}{suffix}", int(expert), columns, kind == "weight")


def stored_shape(stored: str, arch: Architecture) -> tuple[int, ...]:
    """Return the shape of a stored tensor, by its name."""
    assert arch.experts is not None
    inputs, width, hidden = arch.experts.num_experts, arch.experts.ffn_hidden_size, arch.hidden_size
    shapes = {
        "gate_up_proj": (hidden, 2 * width),
        "gate_up_proj_bias": (2 * width,),
        "down_proj": (width, hidden),
        "down_proj_bias": (hidden,),
    }
    return (inputs, *shapes[stored.rpartition(".")[2]])


def stored_names(names: Iterable[str], arch: Architecture) -> list[str]:
    """Return the stored tensors of the name table's tensors, each when all its parts have come."""
    count: dict[str, int] = {}
    result = []
    for name in names:
        part = part_of(name, arch)
        if part is None:
            result.append(name)
            continue
        count[part.stored] = count.get(part.stored, 0) + 1
        if count[part.stored] == _num_parts(part, arch):
            result.append(part.stored)
    return result


def stored_tensors(tensors: Iterable[tuple[str, Tensor]], arch: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of :func:`stored_names`. A stored tensor is in memory from its first part to its last."""
    waiting: dict[str, tuple[Tensor, int]] = {}
    for name, tensor in tensors:
        part = part_of(name, arch)
        if part is None:
            yield name, tensor
            continue
        whole, count = waiting.pop(part.stored, (None, 0))
        if whole is None:
            whole = torch.empty(stored_shape(part.stored, arch), dtype=tensor.dtype, device=tensor.device)
        part.take(whole[part.expert]).copy_(tensor)
        if count + 1 == _num_parts(part, arch):
            yield part.stored, whole
        else:
            waiting[part.stored] = (whole, count + 1)
    assert not waiting, f"parts of {', '.join(waiting)} are missing"


def _num_parts(part: Part, arch: Architecture) -> int:
    assert arch.experts is not None
    return arch.experts.num_experts * (2 if "gate_up" in part.stored else 1)
