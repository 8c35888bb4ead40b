"""What the config refuses for a model without a name table."""

from __future__ import annotations

import re
from typing import Any

import pytest

from megatron_dypo.config.reading.load import parse_config
from megatron_dypo.config.tree import Config


def parse(**sections: Any) -> Config:
    tree = {"model": {"hf_path": "m", "family": "bridge"}, "data": {"prompts": ["p.jsonl"]}}
    return parse_config({**tree, **sections}, where="run.yaml")


@pytest.mark.parametrize("transport", ["auto", "broadcast", "disk"])
def test_whole_tensors_can_be_sent(transport: str) -> None:
    assert parse(refit={"transport": transport}).refit.transport == transport


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"refit": {"transport": "p2p"}}, "refit.transport=p2p: must be auto or broadcast or disk"),
        ({"refit": {"transport": "local"}}, "refit.transport=local: must be auto or broadcast or disk"),
        ({"refit": {"quantize": "fp8_block"}}, "refit.quantize=fp8_block: must be none"),
        ({"objective": {"replay": "rollout"}}, "objective.replay=rollout: must be off"),
        ({"probe": {"every": 10}}, "probe.every=10: must be 0"),
        ({"run": {"smoke": True}}, "run.smoke=true: must be false"),
        (
            {"model": {"hf_path": "m", "family": "bridge", "fp8": {"recipe": "mxfp8"}}},
            "model.fp8.recipe=mxfp8: must be none",
        ),
    ],
)
def test_what_needs_a_name_table_is_refused_in_one_line(sections: dict[str, Any], message: str) -> None:
    whole = f"{message} with model.family=bridge, as the model has no name table"
    with pytest.raises(ValueError, match=re.escape(whole)) as caught:
        parse(**sections)
    assert "\n" not in str(caught.value)
    if "model" not in sections:
        parse(model={"hf_path": "m"}, **sections)  # what has a table can do it


def test_another_family_is_an_error_that_names_the_choices() -> None:
    with pytest.raises(ValueError, match="family='gemma': Input should be 'auto' or"):
        parse(model={"hf_path": "m", "family": "gemma"})
