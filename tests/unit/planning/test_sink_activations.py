"""The bytes that attention with sinks keeps, against the tensors that autograd keeps."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_dypo.mcore.attention import attend, plan
from megatron_dypo.mcore.sink_attention import Sinks
from megatron_dypo.models.windows import Windows
from megatron_dypo.planning.sink_activations import sink_bytes
from tests.support.architectures import make_arch
from tests.support.literal_attention import CPU


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_count_is_that_of_the_tensors_kept(dtype, window):
    length, heads, groups, channels = 1024, 8, 2, 64
    windows = None if window is None else Windows(size=window, layers=(0,))
    arch = make_arch(
        "gpt_oss",
        num_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=channels,
        windows=windows,
    )
    q, k, v = (torch.randn(length, h, channels, dtype=dtype, requires_grad=True) for h in (heads, groups, groups))
    sink = torch.zeros(heads, dtype=dtype, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() > length:  # neither the sinks nor the plan's indices
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attend(q, k, v, plan((0, length), CPU), None, Sinks(sink, window))
    assert sink_bytes(arch, dtype.itemsize, grouped=True) * length == pytest.approx(sum(kept.values()), rel=0.05)


def test_layers_are_counted_by_their_kind():
    arch = make_arch("gpt_oss", head_dim=64)  # two layers of four have a window
    every = dataclasses.replace(arch, windows=Windows(size=8, layers=(0, 1, 2, 3)))
    none = dataclasses.replace(arch, windows=None)
    whole, half, windowed = (sink_bytes(each, 2, grouped=False) for each in (none, arch, every))
    assert half == (whole + windowed) / 2
    assert windowed > whole
