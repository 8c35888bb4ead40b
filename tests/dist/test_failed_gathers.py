"""A rank that fails while weights are gathered ends the gather on all ranks at once, not after a time-out."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_dypo.models.experts import Experts
from megatron_dypo.refit.plan.refit_plan import Mesh
from tests.support.architectures import make_arch
from tests.support.dist.spawn import join_world, run_ranks
from tests.support.refit_standins import held_names, plain_layout, shard

TIMEOUT_S = 3600.0
"""Time-out of the groups. It is longer than any test may take: nobody can have waited for it."""
ARCH = make_arch("qwen3")
MIXTURE = make_arch(
    "qwen3_moe", experts=Experts(num_experts=2, per_token=1, ffn_hidden_size=8, normalized=True, moe_aux_loss_coef=0.0)
)


def faulty_params(fault: str, named: list[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    """Yield the parameters; the middle one may have a name that no family has."""
    middle = len(named) // 2
    if fault == "a name without a rule":
        named[middle] = ("decoder.unheard_of.weight", named[middle][1])
    return named


def consume(fault: str, tensors: Iterator[tuple[str, torch.Tensor]]) -> int:
    """Take the tensors until the end or the fault; return how many came."""
    count = 0
    for _ in tensors:
        count += 1
        if count == 3 and fault == "a consumer that raises":
            raise OSError("disk full")
        if count == 3 and fault == "a consumer that stops":
            break
    return count


def rank_gathers(fault: str, mixture: bool, faulty_rank: int) -> tuple[str, str]:
    """Return the error of this rank and its text."""
    from megatron_dypo.models.gather import exhausted, iter_hf_tensors

    join_world(datetime.timedelta(seconds=TIMEOUT_S))
    rank, arch = dist.get_rank(), MIXTURE if mixture else ARCH
    axes = Mesh(tensor=2, expert_tensor=2 if mixture else 1)
    groups: dict[str, Any] = {"tp_group": dist.new_group([0, 1])}
    if mixture:  # another group on the same ranks
        groups["etp_group"] = dist.new_group([0, 1])
    layout = dataclasses.replace(plain_layout(axes, rank), **groups)
    named = [(name, shard(name, arch, layout, 1)) for name in held_names(arch, axes, layout)]
    is_faulty = rank == faulty_rank
    params = faulty_params(fault, named) if is_faulty else named
    outcome = "", ""
    try:
        if fault == "a consumer that stops":
            consume(fault if is_faulty else "", iter_hf_tensors(params, arch, layout))
        else:
            with exhausted(iter_hf_tensors(params, arch, layout)) as tensors:
                consume(fault if is_faulty else "", tensors)
    except Exception as error:  # noqa: BLE001 (any kind is returned)
        outcome = type(error).__name__, str(error)
    dist.destroy_process_group()
    return outcome


@pytest.mark.parametrize("mixture", [False, True], ids=["dense", "experts"])
@pytest.mark.parametrize("faulty_rank", [0, 1])
def test_a_parameter_that_one_rank_cannot_name_ends_the_gather_on_all(mixture: bool, faulty_rank: int) -> None:
    results = run_ranks(2, rank_gathers, "a name without a rule", mixture, faulty_rank)
    name, text = results[faulty_rank]
    assert name == "ValueError"
    assert "decoder.unheard_of.weight" in text
    assert results[1 - faulty_rank] == ("PeerFailedError", "another rank failed while weights were gathered")


def test_a_consumer_that_raises_lets_the_others_finish_their_gathers() -> None:
    raised, (other, _) = run_ranks(2, rank_gathers, "a consumer that raises", False, 0)
    assert (raised, other) == (("OSError", "disk full"), "")


def test_a_consumer_that_stops_early_is_a_failure_of_its_peers() -> None:
    (name, _), (other, _) = run_ranks(2, rank_gathers, "a consumer that stops", False, 0)
    assert (name, other) == ("", "PeerFailedError")
