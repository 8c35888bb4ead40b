"""Each rank gets exactly the routes of its own tokens and layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest

from megatron_dypo.batching.pack import alignment, microbatch_length, pack, padded_lengths, sequence_alignment
from megatron_dypo.batching.routes import Share, cut_routes, has_routes, put_routes
from megatron_dypo.batching.zigzag import shard
from megatron_dypo.rollout.routes import RouteShape
from megatron_dypo.types import Microbatch, Routes, Sample, SampleKind, Treatment

LAYERS, PER_TOKEN = 5, 3
SHAPE = RouteShape(num_layers=LAYERS, per_token=PER_TOKEN, num_experts=60_000)
STAGES = ((0, 1), (2, 4), (3,))
"""Layers of three ranks; those of the second do not follow each other, as with virtual stages."""


def sample(order: int, length: int, routes: Routes | None) -> Sample:
    return Sample(
        order=order,
        member=0,
        treatment=Treatment.REINFORCE,
        kind=SampleKind.ROLLOUT,
        tokens=np.arange(length, dtype=np.int32),
        num_prompt_tokens=1,
        policy_version=0,
        routes=routes,
    )


def named(order: int, position: int, layer: int, rank: int) -> int:
    """Return a number that no other token, layer and place of all samples has."""
    return ((order * 40 + position) * LAYERS + layer) * PER_TOKEN + rank


def named_routes(order: int, rows: int) -> Routes:
    sizes = (range(rows), range(LAYERS), range(PER_TOKEN))
    values = [named(order, *place) for place in product(*sizes)]
    return np.array(values, SHAPE.dtype).reshape(rows, LAYERS, PER_TOKEN)


def make_samples() -> list[Sample]:
    """Return samples with the routes of all tokens but the last, of few tokens, and of none."""
    return [
        sample(0, 13, named_routes(0, 12)),
        sample(1, 7, None),
        sample(2, 21, named_routes(2, 20)),
        sample(3, 6, named_routes(3, 3)),
    ]


def packed(samples: Sequence[Sample], context: int, tensor: int) -> Microbatch:
    per_sequence = sequence_alignment(context)
    lengths = padded_lengths(samples, per_sequence)
    members = [2, 0, 3, 1]
    return pack(samples, members, microbatch_length(lengths, [members], alignment(tensor, context)), per_sequence, ())


def shares(context: int, tensor: int) -> list[Share]:
    places = product(STAGES, range(context), range(tensor))
    return [
        Share(rank=rank, cp_rank=cp_rank, part=part, parts=tensor, layers=layers)
        for rank, (layers, cp_rank, part) in enumerate(places)
    ]


@pytest.mark.parametrize(("context", "tensor"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 2)])
def test_every_rank_gets_the_routes_of_its_tokens_and_layers(context: int, tensor: int) -> None:
    samples = make_samples()
    whole = packed(samples, context, tensor)
    for share in shares(context, tensor):
        mine = shard(whole, share.cp_rank, context)
        size = len(mine.tokens_T) // tensor
        own = slice(share.part * size, (share.part + 1) * size)
        routes = cut_routes(whole, samples, share, SHAPE, context)
        assert routes.shape == share.shape(whole, context, PER_TOKEN) == (size, len(share.layers), PER_TOKEN)
        for row, index, position in zip(routes, mine.sample_T[own], mine.positions_T[own], strict=True):
            known = samples[index].routes if index >= 0 else None
            is_known = known is not None and position < len(known)
            expected = [
                [named(index, position, layer, rank) if is_known else SHAPE.unknown for rank in range(PER_TOKEN)]
                for layer in share.layers
            ]
            assert row.tolist() == expected


@pytest.mark.parametrize(("context", "tensor"), [(1, 1), (2, 2), (4, 2)])
def test_the_parts_of_all_ranks_are_the_routes_of_the_samples(context: int, tensor: int) -> None:
    samples = make_samples()
    whole = packed(samples, context, tensor)
    back = [np.full((len(s.tokens), LAYERS, PER_TOKEN), 7, SHAPE.dtype) for s in samples]
    for share in shares(context, tensor):
        put_routes(back, cut_routes(whole, samples, share, SHAPE, context), whole, share, context)
    for found, one in zip(back, samples, strict=True):
        known = np.full_like(found, SHAPE.unknown)
        if one.routes is not None:
            known[: len(one.routes)] = one.routes
        np.testing.assert_array_equal(found, known)


def test_a_microbatch_without_routes_is_known_as_such() -> None:
    samples = make_samples()
    assert has_routes(packed(samples, 2, 2), samples)
    bare = [sample(0, 4, None), sample(1, 4, None)]
    assert not has_routes(pack(bare, [0, 1], 8, 1, ()), bare)
    assert not has_routes(pack(bare, [], 8, 1, ()), bare)


@pytest.mark.parametrize(
    "routes",
    [
        np.zeros((5, LAYERS, PER_TOKEN), SHAPE.dtype),
        np.zeros((3, LAYERS + 1, PER_TOKEN), SHAPE.dtype),
        np.zeros((3, LAYERS, PER_TOKEN - 1), SHAPE.dtype),
        np.zeros((3, LAYERS, PER_TOKEN), np.uint8),
    ],
)
def test_routes_of_another_shape_are_refused(routes: Routes) -> None:
    samples = [sample(0, 4, routes)]
    share = Share(rank=0, cp_rank=0, part=0, parts=1, layers=(0,))
    rule = "for 4 tokens: must be at most one row a token of (5, 3), type uint16"
    with pytest.raises(ValueError, match=re.escape(f"routes of shape {routes.shape} and type {routes.dtype} {rule}")):
        cut_routes(pack(samples, [0], 4, 1, ()), samples, share, SHAPE, 1)


@pytest.mark.parametrize(
    ("num_experts", "dtype", "unknown"),
    [(8, "uint8", 255), (254, "uint8", 255), (255, "uint16", 65535), (256, "uint16", 65535)],
)
def test_the_type_has_one_value_that_is_no_expert(num_experts: int, dtype: str, unknown: int) -> None:
    shape = RouteShape(num_layers=94, per_token=8, num_experts=num_experts)
    assert (shape.dtype.name, shape.unknown) == (dtype, unknown)
    assert shape.bytes_per_token == 94 * 8 * (1 if dtype == "uint8" else 2)
