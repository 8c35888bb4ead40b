"""The replica that gets each sample of an update."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from megatron_dypo.batching.exchange import balance, num_tokens, owners
from megatron_dypo.batching.wire import without_arrays
from tests.support.objective_cases import random_groups


class OneLeader:
    """The process group of a run with one replica."""

    def size(self) -> int:
        return 1


def test_work_is_shared_by_cost_not_by_number():
    work = [(0, 0, 100.0), (1, 0, 20.0), (2, 0, 20.0), (3, 0, 20.0), (4, 0, 20.0), (5, 0, 20.0)]
    shares = owners(work, 2)
    assert len({shares[order, 0] for order in range(1, 6)}) == 1
    assert shares[0, 0] != shares[1, 0]


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_the_shares_do_not_depend_on_who_holds_what(replicas):
    rng = np.random.default_rng(2)
    work = [(order, member, float(rng.integers(1, 9) ** 2)) for order in range(7) for member in range(3)]
    shares = owners(iter(work), replicas)
    assert shares.keys() == {(order, member) for order, member, _ in work}
    assert owners([work[i] for i in rng.permutation(len(work))], replicas) == shares
    loads = [sum(cost for order, member, cost in work if shares[order, member] == r) for r in range(replicas)]
    assert max(loads) - min(loads) <= max(cost for *_, cost in work)


def test_samples_of_one_replica_come_back_in_the_order_of_prompts_and_members():
    samples = [s for g in random_groups(4) for s in g]
    shuffled = [samples[i] for i in np.random.default_rng(0).permutation(len(samples))]
    one_leader: Any = OneLeader()
    assert balance(shuffled, one_leader, num_tokens) == samples


def test_a_samples_work_is_its_tokens_where_nothing_else_is_said():
    sample = random_groups(4)[0][0]
    assert num_tokens(sample) == len(sample.tokens)


def test_a_bare_sample_keeps_what_a_forward_pass_reads_and_no_more():
    sample = dataclasses.replace(random_groups(1)[-1][0], weights={"nll_weight": 1.0})
    bare = without_arrays(sample)
    assert (bare.rollout_logp, bare.old_logp, bare.ref_logp, bare.weights) == (None, None, None, None)
    kept = ("order", "member", "treatment", "tokens", "num_prompt_tokens", "policy_version", "is_correct", "reward")
    assert all(getattr(bare, name) is getattr(sample, name) for name in kept)
    assert sample.weights is not None
