"""A trainer rank's tensors of experts that an HF folder stacks."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dypo.models.families.registry import family_rows, match
from megatron_dypo.models.stacked_experts import find_part, stored_tensors
from megatron_dypo.parallel.groups import MeshRank
from megatron_dypo.refit.source import Source
from tests.support.architectures import make_arch
from tests.support.refit_standins import hf_tensors, shard

ARCH = make_arch("gpt_oss")


def test_one_stack_is_in_memory_at_a_time(layout: MeshRank) -> None:
    """Megatron lists one expert after the other, each with parts of all stacks."""
    names = sorted(row.mcore for row in family_rows(ARCH))
    params = {name: shard(name, ARCH, layout, seed=0) for name in names}
    stack_of = {id(param): find_part(match(name, ARCH).hf[0]) for name, param in params.items()}
    begun: set[str] = set()

    def value(param: Tensor) -> Tensor:
        if part := stack_of[id(param)]:
            begun.add(part.stored)
            assert len(begun) == 1
        return param

    source = Source(layout=layout, arch=ARCH, named_params=params.items, values=value)
    expected = dict(stored_tensors(hf_tensors(ARCH, 0).items(), ARCH))
    for name, tensor in source.tensors():
        begun.discard(name)
        assert torch.equal(tensor, expected.pop(name)), name
    assert not expected
