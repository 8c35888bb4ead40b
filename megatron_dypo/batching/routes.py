"""The part of a packed microbatch's routes (the experts of its tokens) that one rank needs. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_dypo.batching.zigzag import zigzag_indices
from megatron_dypo.rollout.routes import RouteShape
from megatron_dypo.types import Microbatch, Routes, Sample, Tokens


@dataclass(frozen=True, kw_only=True)
class Share:
    """The part of each microbatch that the routers of one rank see."""

    rank: int
    """Number of the rank in the world."""
    cp_rank: int
    part: int
    """Under sequence parallelism the rank's number on the tensor-parallel axis, else 0."""
    parts: int
    """Under sequence parallelism the size of that axis, else 1."""
    layers: tuple[int, ...]
    """Indices of the layers whose routers the rank holds, from 0, in the order of its model chunks."""

    def tokens(self, microbatch: Microbatch, context: int) -> npt.NDArray[np.int64]:
        """Return the positions in a whole microbatch of the tokens that the rank's routers see, in their order."""
        held = zigzag_indices(microbatch.cu_seqlens_S, self.cp_rank, context)
        size, rest = divmod(len(held), self.parts)
        assert rest == 0, f"{len(held)} tokens: alignment() makes them a multiple of {self.parts}"
        return held[self.part * size : (self.part + 1) * size]

    def shape(self, microbatch: Microbatch, context: int, per_token: int) -> tuple[int, int, int]:
        """Return the shape of this part of a whole microbatch's routes."""
        return int(microbatch.cu_seqlens_S[-1]) // context // self.parts, len(self.layers), per_token


def cut_routes(
    microbatch: Microbatch, samples: Sequence[Sample], share: Share, shape: RouteShape, context: int
) -> Routes:
    """Return the routes that one rank needs for a whole microbatch: [T', layers, k], unknown where there are none.

    Args:
        samples: those that were packed, which ``sample_T`` counts.
        context: number of context-parallel ranks.

    Raises:
        ValueError: a sample's routes have another shape, or are more than its tokens.
    """
    tokens = share.tokens(microbatch, context)
    routes = np.full((len(tokens), len(share.layers), shape.per_token), shape.unknown, shape.dtype)
    for index, rows, positions in _by_sample(microbatch, tokens):
        known = samples[index].routes
        if known is None:
            continue
        _require_shape(samples[index], known, shape)
        is_known = positions < len(known)
        routes[rows[is_known]] = known[_place(positions[is_known], share.layers)]
    return routes


def put_routes(routes: Sequence[Routes], part: Routes, microbatch: Microbatch, share: Share, context: int) -> None:
    """Write one rank's part of a microbatch into the routes of whole samples, which are longer than they need be.

    Args:
        routes: [L, layers, k] of each sample that was packed.
        part: [T', layers, k] of the rank's tokens and layers.
    """
    for index, rows, positions in _by_sample(microbatch, share.tokens(microbatch, context)):
        routes[index][_place(positions, share.layers)] = part[rows]


def has_routes(microbatch: Microbatch, samples: Sequence[Sample]) -> bool:
    """Return whether a sample of the microbatch has routes."""
    return any(samples[index].routes is not None for index in np.unique(microbatch.sample_T) if index >= 0)


def _by_sample(
    microbatch: Microbatch, tokens: npt.NDArray[np.int64]
) -> Iterator[tuple[int, npt.NDArray[np.int64], Tokens]]:
    """Yield each sample that has some of the tokens: its index, their indices in ``tokens``, their positions in it."""
    sample_T, positions_T = microbatch.sample_T[tokens], microbatch.positions_T[tokens]
    for index in np.unique(sample_T[sample_T >= 0]).tolist():
        rows = np.flatnonzero(sample_T == index)
        yield index, rows, positions_T[rows]


def _place(positions: Tokens, layers: tuple[int, ...]) -> tuple[Any, Any]:
    """Return the index of these positions and layers in the routes of a whole sample; layers that follow each other are
    a slice, which is faster."""
    first = layers[0] if layers else 0
    if layers == tuple(range(first, first + len(layers))):
        return positions, slice(first, first + len(layers))
    return positions[:, None], np.array(layers)


def _require_shape(sample: Sample, routes: Routes, shape: RouteShape) -> None:
    whole = (len(routes), shape.num_layers, shape.per_token)
    if routes.shape != whole or routes.dtype != shape.dtype or len(routes) > len(sample.tokens):
        raise ValueError(
            f"routes of shape {routes.shape} and type {routes.dtype} for {len(sample.tokens)} tokens: must be at most "
            f"one row a token of {whole[1:]}, type {shape.dtype}"
        )
