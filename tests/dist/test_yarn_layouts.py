"""YaRN's scaling reaches every way of computing attention: gradients equal those of one rank without recomputation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.dist.logits import YARN
from tests.support.dist.spawn import run_ranks
from tests.support.dist.training import start
from tests.support.hf_models import make_hf_model

LAYOUTS = {
    "context": (2, {"context": 2}, "none"),
    "recompute all": (1, {}, "full"),
    "recompute attention": (1, {}, "selective"),
    "context, recompute": (2, {"context": 2}, "full"),
}


def rank_train(path: str, axes: dict, recompute: str) -> list[tuple[float, float]]:
    """Return gradient norm and rate of two updates on rows of up to 16 tokens; the model has 4 original positions."""
    from megatron_dypo.config.model import ParallelConfig
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.parallel.groups import close

    parallel = ParallelConfig(**axes)
    layout = start_megatron(parallel)
    result = start(path, layout, parallel, recompute=recompute).train(1, 2)
    close(layout)
    return result


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    rope = {**YARN, "original_max_position_embeddings": 4}
    return str(make_hf_model("qwen2", tmp_path_factory.mktemp("hf") / "qwen2", rope_parameters=rope))


@pytest.fixture(scope="module")
def expected(model: str) -> list[tuple[float, float]]:
    return run_ranks(1, rank_train, model, {}, "none")[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_yarn_gradients_are_the_same_in_every_layout(name: str, model: str, expected: list) -> None:
    world_size, axes, recompute = LAYOUTS[name]
    for result in run_ranks(world_size, rank_train, model, axes, recompute):
        np.testing.assert_allclose(result, expected, rtol=1e-5)


def test_yarn_changes_gradients(model: str, expected: list, tmp_path: Path) -> None:
    plain = make_hf_model("qwen2", tmp_path / "plain")
    other = run_ranks(1, rank_train, str(plain), {}, "none")[0]
    assert abs(other[0][0] / expected[0][0] - 1) > 1e-3
