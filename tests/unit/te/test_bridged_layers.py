"""Models of Megatron-Bridge keep its layers of Transformer Engine's classes, in the lowest and the highest version."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.bridged_models import KINDS, NEEDS_BRIDGE, make_bridged_model
from tests.support.te import bridged
from tests.support.te.run import VERSIONS, run_with_te, te_folder

pytestmark = NEEDS_BRIDGE


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_go_there_and_back_bit_for_bit(kind: str, version: str, tmp_path: Path) -> None:
    te_folder(version)
    found = run_with_te(version, bridged.load_bridged_model, str(make_bridged_model(kind, tmp_path)))
    assert {"TEDotProductAttention", "TELayerNormColumnParallelLinear", "TERowParallelLinear"} <= set(found["classes"])
    assert (found["names"], found["different"]) == ([], [])
