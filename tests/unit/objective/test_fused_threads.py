"""Fused log-probs with the vocabulary split over ranks, which are threads of this process over real gloo groups."""

import pytest
import torch

from megatron_dypo.objective.fused_logprobs import fused_logprobs
from tests.support.fused_cases import (
    CASES,
    EVERYTHING,
    ONE_ROW,
    THREE_ROWS,
    gradient_error,
    over_ranks,
    reference,
    relative_error,
    weighted_sum,
)


@pytest.mark.parametrize("budget", [ONE_ROW, THREE_ROWS, EVERYTHING])
@pytest.mark.parametrize(("size", "vocab_size"), [(2, 16), (2, 11), (4, 14)])
@pytest.mark.parametrize("name", ["random", "peaked", "extremes", "near one-hot", "ties"])
@pytest.mark.parametrize("with_bonus", [False, True])
def test_ranks_agree_and_their_gradients_are_shares_of_the_float64_one(with_bonus, name, size, vocab_size, budget):
    g = torch.Generator().manual_seed(0)
    hidden, weight = CASES[name](g)
    targets = torch.randint(0, vocab_size, (len(hidden),), generator=g)
    coef = torch.randn(len(hidden), generator=g)
    bonus = torch.randn(len(hidden), generator=g) if with_bonus else None
    expected = reference(hidden, weight, targets, coef, vocab_size, entropy_coef_N=bonus)

    def work(rank, group):
        own_hidden, part = hidden.clone().requires_grad_(), weight.chunk(size)[rank].clone().requires_grad_()
        logp, entropy = fused_logprobs(
            own_hidden, part, targets, vocab_size=vocab_size, group=group, memory_budget=budget
        )
        weighted_sum(logp, coef, entropy, bonus).backward()
        return logp.detach(), entropy.detach(), own_hidden.grad, part.grad

    ranks = over_ranks(size, work)
    for logp, entropy, *_ in ranks:
        assert torch.equal(logp, ranks[0][0])
        assert torch.equal(entropy, ranks[0][1])
    assert relative_error(ranks[0][0], expected[0]) <= 1e-6
    assert relative_error(ranks[0][1], expected[1]) <= 1e-6
    assert gradient_error(sum(hidden_grad for *_, hidden_grad, _ in ranks), expected[2]) <= 1e-5
    assert gradient_error(torch.cat([weight_grad for *_, weight_grad in ranks]), expected[3]) <= 1e-5


def test_a_rank_without_a_real_entry_is_refused_on_every_rank():
    def work(rank, group):
        with pytest.raises(ValueError, match="vocab_size=8: 3 tensor-parallel ranks of 4 entries; the last has none"):
            fused_logprobs(
                torch.zeros(1, 2), torch.zeros(4, 2), torch.zeros(1, dtype=torch.long), vocab_size=8, group=group
            )

    over_ranks(3, work)
