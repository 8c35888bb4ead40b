"""The layers of each stage and chunk."""

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_dypo.parallel.mesh import Mesh


@pytest.mark.parametrize(
    ("fields", "num_layers", "chunks"),
    [
        ({}, 3, ["012"]),
        ({"pipeline": 2}, 4, ["01", "23"]),
        ({"pipeline": 2, "virtual_pipeline": 2}, 8, ["01 45", "23 67"]),
        ({"pipeline": 2, "first_stage_layers": 1}, 4, ["0", "123"]),
        ({"pipeline": 2, "last_stage_layers": 1}, 4, ["012", "3"]),
        ({"pipeline": 2, "first_stage_layers": 3, "last_stage_layers": 1}, 4, ["012", "3"]),
        ({"pipeline": 4, "first_stage_layers": 1, "last_stage_layers": 2}, 9, ["0", "123", "456", "78"]),
        ({"pipeline": 3, "last_stage_layers": 1}, 5, ["01", "23", "4"]),
        ({"pipeline": 2, "virtual_pipeline": 2, "first_stage_layers": 2}, 6, ["0 3", "12 45"]),
        (
            {"pipeline": 3, "virtual_pipeline": 2, "first_stage_layers": 2, "last_stage_layers": 2},
            8,
            ["0 4", "12 56", "3 7"],
        ),
    ],
)
def test_layers_run_through_the_first_chunk_of_every_stage_then_the_second(fields, num_layers, chunks):
    found = Mesh(**fields).chunks(num_layers)
    assert [" ".join("".join(map(str, chunk)) for chunk in stage) for stage in found] == chunks


def test_94_layers_go_onto_four_stages():
    mesh = Mesh(pipeline=4, first_stage_layers=23, last_stage_layers=23)
    assert mesh.stage_layers(94) == [23, 24, 24, 23]


sizes = st.one_of(st.none(), st.integers(1, 12))


@given(
    num_layers=st.integers(1, 48),
    pipeline=st.integers(1, 6),
    virtual_pipeline=st.integers(1, 3),
    first=sizes,
    last=sizes,
)
def test_every_layer_is_in_one_chunk_and_named_stages_hold_what_they_were_given(
    num_layers, pipeline, virtual_pipeline, first, last
):
    try:
        mesh = Mesh(
            pipeline=pipeline,
            virtual_pipeline=virtual_pipeline,
            first_stage_layers=first,
            last_stage_layers=last,
        )
        chunks = mesh.chunks(num_layers)
    except ValueError:
        assume(False)
    assert [len(stage) for stage in chunks] == [virtual_pipeline] * pipeline
    assert all(len({len(chunk) for chunk in stage}) == 1 for stage in chunks)
    in_order = [layer for number in range(virtual_pipeline) for stage in chunks for layer in stage[number]]
    assert in_order == list(range(num_layers))
    layers = mesh.stage_layers(num_layers)
    assert layers == [sum(map(len, stage)) for stage in chunks]
    assert min(layers) > 0
    assert first in (None, layers[0])
    assert last in (None, layers[-1])
    between = layers[first is not None : pipeline - (last is not None)]
    assert len(set(between)) <= 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pipeline": 0}, "pipeline=0: must be positive"),
        ({"first_stage_layers": 4}, "first_stage_layers=4: needs pipeline > 1"),
        ({"pipeline": 2, "last_stage_layers": 0}, "last_stage_layers=0: must be positive"),
        (
            {"pipeline": 2, "virtual_pipeline": 2, "last_stage_layers": 3},
            "last_stage_layers=3: virtual_pipeline=2 must divide it",
        ),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Mesh(**fields)


WAY_OUT = "; parallel.first_stage_layers and parallel.last_stage_layers set the layers of these stages"


@pytest.mark.parametrize(
    ("fields", "num_layers", "message"),
    [
        ({"pipeline": 4}, 94, "parallel.pipeline=4 does not divide num_hidden_layers=94" + WAY_OUT),
        (
            {"pipeline": 4, "virtual_pipeline": 2},
            94,
            "parallel.pipeline × virtual_pipeline=8 does not divide num_hidden_layers=94" + WAY_OUT,
        ),
        (
            {"pipeline": 4, "first_stage_layers": 23},
            94,
            "parallel.first_stage_layers=23: leaves 71 of num_hidden_layers=94, which the 3 other stages "
            "cannot share evenly",
        ),
        (
            {"pipeline": 4, "virtual_pipeline": 3, "first_stage_layers": 24, "last_stage_layers": 24},
            99,
            "parallel.first_stage_layers=24, parallel.last_stage_layers=24: leaves 51 of num_hidden_layers=99, "
            "which the 2 other stages of 3 chunks cannot",
        ),
        (
            {"pipeline": 2, "first_stage_layers": 40, "last_stage_layers": 50},
            94,
            "parallel.first_stage_layers=40, parallel.last_stage_layers=50: must add up to num_hidden_layers=94",
        ),
        (
            {"pipeline": 3, "first_stage_layers": 50, "last_stage_layers": 44},
            94,
            "parallel.last_stage_layers=44: leaves none of num_hidden_layers=94 to the other stage",
        ),
    ],
)
def test_layers_that_cannot_be_laid_out_are_refused_with_fields_and_rule(fields, num_layers, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Mesh(**fields).stage_layers(num_layers)


@pytest.mark.parametrize(("pipeline", "virtual_pipeline", "num_layers"), [(5, 1, 4), (2, 2, 5)])
def test_no_way_out_is_offered_where_there_is_none(pipeline, virtual_pipeline, num_layers):
    with pytest.raises(ValueError, match=r"does not divide num_hidden_layers=[45]$"):
        Mesh(pipeline=pipeline, virtual_pipeline=virtual_pipeline).stage_layers(num_layers)
