"""The digest of weights, and the versions that a run knows by it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from megatron_dypo.loop.journal.weights import Weights, weights_digest


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def parameters(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in {"a": (5, 7), "b": (11,), "c": (64, 9)}.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_change_of_a_weight_changes_the_digest_and_a_copy_does_not(dtype: torch.dtype) -> None:
    found = {weights_digest(parameters(dtype).items())}
    assert weights_digest({name: value.clone() for name, value in parameters(dtype).items()}.items()) in found
    for name, value in parameters(dtype).items():
        for place in range(0, value.numel(), 41):
            changed = parameters(dtype)
            bits = changed[name].view(-1)[place : place + 1].view(torch.uint8)
            bits[0] ^= 1
            digest = weights_digest(changed.items())
            assert digest not in found
            found.add(digest)
    swapped = parameters(dtype)
    swapped["b"] = swapped["b"].flip(0)
    renamed = {name + "'": value for name, value in parameters(dtype).items()}
    reshaped = {name: value.view(-1) for name, value in parameters(dtype).items()}
    assert {weights_digest(other.items()) for other in (swapped, renamed, reshaped)} & found == set()


def test_versions_that_are_too_old_are_forgotten_and_a_known_digest_stays() -> None:
    digests = iter("abcdefgh")
    weights = Weights(digest=lambda: next(digests), keeps=2)
    for version in (0, 1, 1, 2, 4):
        weights.note(version)
    assert weights.known == {2: "c", 4: "d"}
    assert weights.of([2, 4, 2]) == {2: "c", 4: "d"}
    assert weights.of([1]) is None
    assert weights.are_mine({2: "c"})
    assert not weights.are_mine({2: "x"})
    assert not weights.are_mine({4: "d", 1: "b"})


def test_a_resumed_run_knows_no_version_after_its_checkpoint() -> None:
    before = Weights(digest=lambda: "x", keeps=9, known={3: "a", 5: "b"})
    resumed = Weights(digest=lambda: "y", keeps=9)
    resumed.restore(before.as_json(), step=4)
    assert resumed.known == {3: "a"}
    resumed.note(3)
    resumed.note(5)
    assert resumed.known == {3: "a", 5: "y"}
