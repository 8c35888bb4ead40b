"""The name of the servers' backend in this torch."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from megatron_dypo.parallel.device import update_backend


@pytest.mark.parametrize(
    ("name", "torch_version", "here"),
    [
        ("nccl", "2.14.1+cu130", "nccl"),
        ("nccl", "2.15.0", "nccl-legacy"),
        ("nccl", "2.16.0a0+git1", "nccl-legacy"),
        ("gloo", "2.14.1", "gloo"),
        ("gloo", "2.15.0+cpu", "gloo"),
    ],
)
def test_both_ends_of_a_broadcast_have_the_same_backend(name: str, torch_version: str, here: str) -> None:
    assert update_backend(name, torch_version) == here


@pytest.mark.skipif(not dist.is_nccl_available(), reason="needs a torch that is built for GPUs")
def test_this_torch_has_a_backend_of_that_name() -> None:
    assert dist.is_backend_available(update_backend("nccl"))
