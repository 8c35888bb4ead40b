"""The trainer's side of a plan: which rank holds which part of each tensor, and which ranks hold copies. Pure, no
torch.

Ranks are numbered as in Megatron: tensor fastest, then context, data, pipeline. The experts of a stage are spread over
all its ranks: expert-tensor fastest, then expert, then the replicas of the experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_dypo.checks import require
from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.families.registry import table
from megatron_dypo.models.families.table import EXPERT, LAYER, Row
from megatron_dypo.parallel.mesh import Mesh
from megatron_dypo.refit.plan.rectangles import Rectangle, matrix_shape

Kind = Literal["tensor", "stage", "expert"]
Place = Literal["first", "dense", "layer", "last"]
"""A place in the model: before the layers (on the first stage), a layer, or after the layers (on the last stage).
``dense``: a layer with an MLP of a model whose other layers have experts."""


@dataclass(frozen=True)
class Shard:
    """Parameters that some ranks of a stage all hold."""

    stage: int
    kind: Kind
    """``tensor``: one tensor-parallel rank's share of split tensors. ``stage``: tensors that all ranks of the stage
    hold. ``expert``: a share of some experts."""
    index: int
    """``tensor``: the tensor-parallel rank. ``stage``: 0. ``expert``: expert rank × expert_tensor + expert-tensor
    rank."""
    holders: range
    """Global ranks that hold the shard."""


def num_shards(arch: Architecture, layout: Mesh) -> dict[Kind, int]:
    """Return how many shards of each kind a stage has."""
    sizes: dict[Kind, int] = {"tensor": layout.tensor, "stage": 1}
    return {**sizes, "expert": layout.expert * layout.expert_tensor} if arch.experts else sizes


def shards_of_stage(arch: Architecture, layout: Mesh, stage: int) -> Iterator[Shard]:
    """Yield the shards of a stage. Those of one rank come in the order of their kinds."""
    first, end = stage * layout.stage_size, (stage + 1) * layout.stage_size
    for kind, size in num_shards(arch, layout).items():
        for index in range(size):
            yield Shard(stage, kind, index, range(first + index, end, size))


def held_rectangles(arch: Architecture, layout: Mesh, kind: Kind, index: int, place: Place) -> list[Rectangle]:
    """List the rectangles of a shard at one place. For a layer, names contain ``{layer}``.

    Raises:
        ValueError: the mesh does not suit the architecture.
    """
    rectangles: list[Rectangle] = []
    for row in table(arch):
        if _kind(row) == kind and _is_at(row, place, arch) and not row.is_copy:
            for concrete in _of_each_expert(row, arch, layout, index):
                rectangles += _rectangles(concrete, arch, layout, index)
    return rectangles


def _kind(row: Row) -> Kind:
    if row.is_expert:
        return "expert"
    return "stage" if row.rule.tp_dim is None else "tensor"


def place_of(layer: int, arch: Architecture) -> Place:
    """Return the place of a layer."""
    return "dense" if arch.has_both_kinds and not arch.has_experts(layer) else "layer"


def _is_at(row: Row, place: Place, arch: Architecture) -> bool:
    if LAYER not in row.mcore:
        return place == ("first" if row.mcore.startswith("embedding.") else "last")
    if place not in ("dense", "layer"):
        return False
    return row.is_in(0 if place == "dense" else arch.num_layers - 1, arch)


def _of_each_expert(row: Row, arch: Architecture, layout: Mesh, index: int) -> Iterator[Row]:
    """Yield a row of the name table once for each expert of a shard; a row of other tensors once."""
    if EXPERT not in row.mcore or arch.experts is None:
        yield row
        return
    num_experts = arch.experts.num_experts
    require(num_experts % layout.expert == 0, f"expert={layout.expert}", f"does not divide num_experts={num_experts}")
    count, ep_rank = num_experts // layout.expert, index // layout.expert_tensor
    for expert in range(ep_rank * count, (ep_rank + 1) * count):
        yield row.at(None, expert)


def _rectangles(row: Row, arch: Architecture, layout: Mesh, index: int) -> Iterator[Rectangle]:
    """Yield the pieces of a row's rule as rectangles."""
    size = layout.expert_tensor if row.is_expert else layout.tensor
    shapes, along, offset = row.rule.hf_shapes(arch), row.rule.tp_dim or 0, 0
    for piece in row.rule.pieces(arch, index % size, size):
        rows, cols = matrix_shape(shapes[piece.source])
        hf_name = row.hf[piece.source]
        if along == 0:
            yield Rectangle(
                name=row.mcore,
                row=offset,
                col=0,
                hf_name=hf_name,
                hf_row=piece.start,
                hf_col=0,
                rows=piece.length,
                cols=cols,
            )
        else:
            yield Rectangle(
                name=row.mcore,
                row=0,
                col=offset,
                hf_name=hf_name,
                hf_row=0,
                hf_col=piece.start,
                rows=rows,
                cols=piece.length,
            )
        offset += piece.length
