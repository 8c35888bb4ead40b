"""docs/data.md describes formats and fields correctly, and the config accepts them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_dypo.config.reading.load import dump_config, parse_config
from megatron_dypo.data.formats import FORMATS, columns_of

GUIDE = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
MODEL = {"hf_path": "m"}


def test_the_guide_has_the_columns_of_every_format() -> None:
    cells = [[re.findall(r"`([^`]+)`", cell) for cell in line.split("|")[1:6]] for line in GUIDE.splitlines()]
    said = {cell[0][0]: cell[1:] for cell in cells if len(cell) == 5 and cell[0] and cell[0][0] in FORMATS}
    assert said == {
        name: [[columns.prompt], [columns.answer], [columns.source] if columns.source else [], list(columns.traces)]
        for name, columns in FORMATS.items()
    }


def test_the_guide_names_fields_that_exist() -> None:
    for dotted in re.findall(r"`data\.([a-z_.]+)", GUIDE):
        section = parse_config({"model": MODEL, "data": {"prompts": ["p"]}}, where="c").data
        for name in dotted.split("."):
            assert hasattr(section, name), dotted
            section = getattr(section, name)


def test_a_config_gives_one_column_or_several() -> None:
    data = {"prompts": ["p"], "format": "verl", "fields": {"traces": ["a", "b.c"], "trace_checks": "ok", "source": ""}}
    config = parse_config({"model": MODEL, "data": data}, where="c")
    columns = columns_of(config.data.format, config.data.fields)
    assert (columns.traces, columns.trace_checks, columns.source) == (("a", "b.c"), ("ok",), "")
    assert columns.answer == "reward_model.ground_truth"
    assert "- b.c" in dump_config(config)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"format": "parquet"}, r"c: data\.format='parquet': Input should be 'plain', 'verl', 'slime'"),
        ({"on_bad_row": "drop"}, r"c: data\.on_bad_row='drop': Input should be 'error' or 'skip'"),
        ({"fields": {"prompt": ""}}, r"prompt='': names no column, and every row needs one"),
    ],
)
def test_a_config_that_names_none_of_the_choices_is_refused(data: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config({"model": MODEL, "data": {"prompts": ["p"], **data}}, where="c")
