"""Each FP8 recipe of the config is one of Transformer Engine's, in the lowest and the highest version."""

from __future__ import annotations

import pytest

from tests.support.te.models import recipes
from tests.support.te.run import VERSIONS, run_with_te


@pytest.mark.parametrize("version", VERSIONS)
def test_megatron_makes_the_recipe_that_the_config_names(version: str) -> None:
    found = run_with_te(version, recipes)
    assert {name: made[:2] for name, made in found.items()} == {
        "delayed": ["DelayedScaling", "HYBRID"],
        "tensorwise": ["Float8CurrentScaling", "HYBRID"],
        "blockwise": ["Float8BlockScaling", "E4M3"],
        "mxfp8": ["MXFP8BlockScaling", "E4M3"],
    }
    assert found["delayed"][2:] == [1, 32]
