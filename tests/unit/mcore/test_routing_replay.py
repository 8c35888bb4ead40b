"""What one router replays: the given experts with its own scores, in the order of the microbatches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megatron_dypo.mcore.routing_replay import ReplayedRoutes, replayed

TOKENS, EXPERTS, PER_TOKEN = 5, 8, 2


def own_choice(scores: torch.Tensor, topk: int, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.topk(scores, topk, dim=1))  # type: ignore[return-value]


def choose(slot: ReplayedRoutes, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return slot.get_replay_topk(scores, PER_TOKEN, None, None, own_choice)


def make_scores(seed: int = 0) -> torch.Tensor:
    return torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(seed))


def make_routes(seed: int = 0, dtype: type = np.uint8) -> np.ndarray:
    """Return [T, 1, K] routes."""
    rng = np.random.default_rng(seed)
    return rng.random((TOKENS, 1, EXPERTS)).argsort(-1)[..., :PER_TOKEN].astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_given_experts_get_the_routers_own_scores(dtype: type) -> None:
    slot, scores, routes = ReplayedRoutes(0), make_scores().requires_grad_(), make_routes(1, dtype)
    with replayed([slot], routes, is_recomputed=False):
        chosen_scores, chosen = choose(slot, scores)
    np.testing.assert_array_equal(chosen.numpy(), routes[:, 0])
    torch.testing.assert_close(chosen_scores, scores.gather(1, chosen))
    chosen_scores.sum().backward()
    assert scores.grad is not None
    np.testing.assert_array_equal(scores.grad.sum(dim=1).numpy(), [PER_TOKEN] * TOKENS)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_router_chooses_where_no_choice_is_known(dtype: type) -> None:
    slot, scores, routes = ReplayedRoutes(0), make_scores(), make_routes(1, dtype)
    routes[1] = np.iinfo(dtype).max
    routes[3] = 0  # never written by the server: the same expert twice
    with replayed([slot], routes, is_recomputed=False):
        chosen_scores, chosen = choose(slot, scores)
    own_scores, own = own_choice(scores, PER_TOKEN)
    for row in range(TOKENS):
        assert (
            chosen[row].tolist()
            == (own[row] if row in (1, 3) else torch.from_numpy(routes[row, 0].astype(int))).tolist()
        )
    torch.testing.assert_close(chosen_scores[[1, 3]], own_scores[[1, 3]])
    assert int(slot.replayed) == TOKENS - 2


def test_without_routes_the_router_chooses() -> None:
    slot, scores = ReplayedRoutes(0), make_scores()
    with replayed([slot], None, is_recomputed=True):
        found = choose(slot, scores)
    torch.testing.assert_close(found, own_choice(scores, PER_TOKEN))
    assert slot.replayed == 0


def test_the_difference_counts_sets_of_experts() -> None:
    slot, scores = ReplayedRoutes(0), make_scores()
    routes = own_choice(scores, PER_TOKEN)[1].flip(-1).numpy().astype(np.uint8)[:, None]
    routes[2] = [[e for e in range(EXPERTS) if e not in routes[2]][:PER_TOKEN]]
    with replayed([slot], routes, is_recomputed=False):
        choose(slot, scores)
    assert (int(slot.replaced), int(slot.replayed)) == (1, TOKENS)


def test_recomputed_layers_get_the_microbatches_in_their_order() -> None:
    """The schedule runs forward steps ahead of backward steps, which begin with the oldest microbatch."""
    slot, scores, batches = ReplayedRoutes(0), make_scores(), [make_routes(seed) for seed in range(4)]

    def forward(index: int) -> None:
        with replayed([slot], batches[index], is_recomputed=True):
            choose(slot, scores)

    def recomputed() -> list[list[int]]:
        return choose(slot, scores)[1].tolist()

    forward(0)
    forward(1)
    assert recomputed() == batches[0][:, 0].tolist()
    forward(2)
    assert recomputed() == batches[1][:, 0].tolist()
    forward(3)
    assert [recomputed(), recomputed()] == [batches[2][:, 0].tolist(), batches[3][:, 0].tolist()]
    assert int(slot.replayed) == 4 * TOKENS, "a recomputed token counts once"
    with pytest.raises(RuntimeError, match="no microbatch waits to be recomputed"):
        recomputed()


def test_a_layer_that_is_not_recomputed_forgets_its_microbatches() -> None:
    slot = ReplayedRoutes(0)
    with replayed([slot], make_routes(), is_recomputed=True):
        choose(slot, make_scores())
    slot.clear()
    with pytest.raises(RuntimeError, match="outside of a forward step"):
        choose(slot, make_scores())


def test_routes_of_other_tokens_are_an_error() -> None:
    slot = ReplayedRoutes(0)
    with (
        replayed([slot], make_routes()[1:], is_recomputed=False),
        pytest.raises(RuntimeError, match=r"routes of shape \(4, 2\) for a choice of \(5, 2\)"),
    ):
        choose(slot, make_scores())


def test_a_failed_step_leaves_no_routes_behind() -> None:
    slot = ReplayedRoutes(0)
    with pytest.raises(ZeroDivisionError), replayed([slot], make_routes(), is_recomputed=False):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="outside of a forward step"):
        choose(slot, make_scores())
