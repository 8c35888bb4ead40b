"""The random projection of a gradient: unbiased, of the stated spread, and a function of the addresses alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_dypo.models.families.registry import family_rows
from megatron_dypo.models.gradient_projection import RandomProjection, ShardProjector, WholeGradient
from tests.support.architectures import make_arch

ARCH = make_arch()
ROW = next(row for row in family_rows(ARCH) if len(row.hf) == 3)
"""Queries, keys and values in one parameter."""


def gradients(seed: int, count: int = 1) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(row_shape()) for _ in range(count)]


def row_shape() -> tuple[int, ...]:
    return ROW.rule.mcore_shape(ARCH, 1)


def projected(projector: ShardProjector, gradient: torch.Tensor, rank: int = 0, size: int = 1) -> torch.Tensor:
    total = torch.zeros(2 * projector.size, dtype=torch.float64)
    projector.add(total, gradient, ROW, rank, size)
    return projector.signed(total)


def test_inner_products_are_unbiased_and_spread_as_stated() -> None:
    x, y = gradients(0, 2)
    y = y + 0.5 * x
    size, num_seeds = 64, 400
    products = []
    for seed in range(num_seeds):
        projector = ShardProjector(RandomProjection(size, seed), ARCH)
        products.append(float(projected(projector, x) @ projected(projector, y)))
    true = float((x * y).sum())
    bound = np.sqrt(2 / size) * float(x.norm() * y.norm())
    assert abs(np.mean(products) - true) <= 4 * bound / np.sqrt(num_seeds)
    assert 0.3 * bound <= np.std(products) <= 1.2 * bound


def test_shards_of_any_size_add_up_to_the_projection_of_the_whole() -> None:
    (whole,) = gradients(1)
    projector = ShardProjector(RandomProjection(128, 7), ARCH)
    expected = projected(projector, whole)
    hf = ROW.rule.merge([whole], ARCH)
    shards = [projected(projector, ROW.rule.shard(hf, ARCH, rank, 2), rank, 2) for rank in range(2)]
    assert torch.allclose(shards[0] + shards[1], expected, rtol=0, atol=1e-5)
    assert float(expected.norm()) > 0


def test_blocks_and_kept_slots_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = gradients(2)
    expected = projected(ShardProjector(RandomProjection(128, 7), ARCH), whole)
    monkeypatch.setattr("megatron_dypo.models.gradient_projection.BLOCK", {"cpu": 8})
    monkeypatch.setattr("megatron_dypo.models.gradient_projection.KEPT_ENTRIES", 50)
    projector = ShardProjector(RandomProjection(128, 7), ARCH)
    for _ in range(2):
        assert torch.allclose(projected(projector, whole), expected, rtol=0, atol=1e-5)


def slots_of(size: int, seed: int, name: str, rows: int, columns: int) -> torch.Tensor:
    return RandomProjection(size, seed).slots(name, torch.arange(rows), torch.arange(columns), columns)


def test_other_seeds_and_other_tensors_are_projected_in_another_way() -> None:
    slots = slots_of(256, 1, "a", 20, 50)
    assert torch.equal(slots, slots_of(256, 1, "a", 20, 50))
    for other in (slots_of(256, 2, "a", 20, 50), slots_of(256, 1, "b", 20, 50)):
        assert int((slots == other).sum()) < 20, "of 1000 entries about 2 fall on the same of 512 slots"


@pytest.mark.parametrize(("rows", "columns"), [(512 * 400, 1), (1, 512 * 400), (400, 512), (512, 400)])
def test_entries_fall_on_slots_like_independent_throws(rows: int, columns: int) -> None:
    slots = slots_of(256, 1, "a", rows, columns)
    counts = torch.bincount(slots.reshape(-1), minlength=512)
    assert float((counts - 400.0).square().mean()) == pytest.approx(400, rel=0.25)


def test_the_corners_of_rectangles_fall_on_slots_independently() -> None:
    sign = 1.0 - 2.0 * (slots_of(2, 1, "a", 300, 300) >= 2).double()
    corners = sign[:-1, :-1] * sign[1:, :-1] * sign[:-1, 1:] * sign[1:, 1:]
    assert abs(float(corners.mean())) < 5 / 299, "products of four independent signs cancel"
    assert float(torch.linalg.matrix_norm(sign, 2)) < 3 * 300**0.5, "signs of a product form would have norm 300"


def test_the_whole_gradient_is_in_the_order_of_the_table_and_tied_embeddings_are_one() -> None:
    whole = WholeGradient(ARCH)
    assert whole.size == sum(int(np.prod(shape)) for row in family_rows(ARCH) for shape in row.rule.hf_shapes(ARCH))
    tied = make_arch(tied_embeddings=True)
    assert WholeGradient(tied).size == whole.size - ARCH.vocab_size * ARCH.hidden_size
    (gradient,) = gradients(3)
    found = projected(ShardProjector(whole, ARCH), gradient)
    assert float(found.norm()) == pytest.approx(float(gradient.norm()), rel=1e-6)


@pytest.mark.parametrize("size", [0, 1, 3, 1000, -2])
def test_a_size_that_is_no_power_of_two_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=rf"size={size}: must be a power of two"):
        RandomProjection(size, 0)
