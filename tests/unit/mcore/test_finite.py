"""The search for tensors with a value that is not finite."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_dypo.mcore.finite import names_not_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_tensor_with_one_value_that_is_not_finite_is_named(dtype: torch.dtype, value: float) -> None:
    named = {name: torch.zeros(5, 3, dtype=dtype) for name in "abcd"}
    named["b"][4, 2] = value
    named["d"][0, 0] = value
    named["d"][0, 1] = -value
    assert names_not_finite(named.items()) == ["b", "d"]


def test_the_largest_finite_values_are_finite() -> None:
    named = {
        str(dtype): torch.full((7,), torch.finfo(dtype).max, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    }
    assert names_not_finite([*named.items(), ("negative", -named["torch.bfloat16"])]) == []


def test_tensors_of_several_types_and_empty_ones_are_searched_together() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, math.nan]).bfloat16())
    named = [("empty", torch.zeros(0)), ("bias", torch.ones(3)), ("weight", weight)]
    assert names_not_finite(named) == ["weight"]
    assert names_not_finite([]) == []
