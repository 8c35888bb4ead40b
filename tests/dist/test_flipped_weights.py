"""One flipped bit in a checkpoint without a manifest is harmless, or an error of one line, as ``model.mcore_path``."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from megatron_dypo.mcore.checkpoints.convert import hf_to_mcore
from megatron_dypo.mcore.checkpoints.manifest import MANIFEST
from megatron_dypo.parallel.mesh import Mesh
from tests.support.dist.spawn import run_ranks
from tests.support.flips import error_of, flips
from tests.support.hf_models import make_hf_model

FLIPS = {".metadata": 150, "common.pt": 60, "metadata.json": 60}


def rank_try(model: str, folder: str) -> dict[str, list[tuple[tuple[int, int], str, bool]]]:
    """Return file → flip, error, and whether the weights are those of the checkpoint."""
    import torch

    from megatron_dypo.config.model import ParallelConfig
    from megatron_dypo.mcore.checkpoints.weights import load_weights
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.parallel.groups import close
    from tests.support.dist.training import start

    parallel = ParallelConfig()
    layout = start_megatron(parallel)
    chunks = start(model, layout, parallel, distributed=True).chunks
    weights = [weight for chunk in chunks for weight in chunk.parameters()]

    @torch.no_grad()
    def attempt() -> tuple[str, bool]:
        for weight in weights:
            weight.fill_(7)
        error = error_of(partial(load_weights, folder, chunks))
        return error, all(map(torch.equal, weights, expected))

    load_weights(folder, chunks)
    expected = [weight.detach().clone() for weight in weights]
    found = {name: [(flip, *attempt()) for flip in flips(Path(folder) / name, count)] for name, count in FLIPS.items()}
    close(layout)
    return found


@pytest.fixture
def foreign(tmp_path: Path) -> tuple[Path, Path]:
    """Return an HF folder and its checkpoint."""
    hf = make_hf_model("qwen2", tmp_path / "hf")
    hf_to_mcore(hf, tmp_path / "mcore", mesh=Mesh(tensor=2), show_progress=False)
    (tmp_path / "mcore" / MANIFEST).unlink()
    return hf, tmp_path / "mcore"


def test_a_flip_in_a_foreign_checkpoint_gives_the_same_weights_or_names_it(foreign: tuple[Path, Path]) -> None:
    hf, checkpoint = foreign
    (found,) = run_ranks(1, rank_try, str(hf), str(checkpoint))
    for name, flipped in found.items():
        for flip, error, is_same in flipped:
            assert error.startswith(str(checkpoint)) if error else is_same, (name, flip, error)
            assert "\n" not in error, (name, flip)
        assert {bool(error) for _, error, _ in flipped} == {True, False}, f"{name}: some flips do harm, some do not"
