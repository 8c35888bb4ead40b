"""The matmuls with the output weight: how many there are on an accelerator, and that blocks change no result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dypo.objective.projection import Projection

ROWS, VOCAB, HIDDEN = 301, 151_936, 4096


class Products(TorchDispatchMode):
    """Counts matmuls, and the bytes of the largest copy in another type."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.largest_copy = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += "addmm" in func.name()
        if func.name() == "aten::_to_copy":
            self.largest_copy = max(self.largest_copy, result.nbytes)
        return result


def accelerator_like(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor without values on a device that is no CPU."""
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_accelerator_computes_the_logits_of_a_chunk_in_one_product(dtype: torch.dtype) -> None:
    weight, hidden = accelerator_like((VOCAB, HIDDEN), dtype), accelerator_like((ROWS, HIDDEN), dtype)
    with Products() as products:
        Projection(weight, torch.float32, 2**20).logits(hidden, 1.0, accelerator_like((ROWS, VOCAB), torch.float32))
    assert (products.count, products.largest_copy) == (1, 0)


def test_an_accelerator_cuts_the_backward_pass_by_the_gradients_that_it_converts() -> None:
    weight, hidden = (accelerator_like((n, HIDDEN), torch.bfloat16) for n in (VOCAB, ROWS))
    gradient, total = (accelerator_like((n, m), torch.float32) for n, m in ((ROWS, VOCAB), (VOCAB, HIDDEN)))
    scratch = ROWS * VOCAB * 2 // 3 + ROWS * 2  # the parts of a budget: 6/8 for logits in fp32, 1/8 for scratch
    with Products() as products:
        Projection(weight, torch.float32, scratch).backward(gradient, hidden, total)
    assert products.count == 2 * 3
    assert products.largest_copy <= scratch


def test_a_cpu_converts_the_weight_within_its_scratch() -> None:
    weight, hidden = torch.randn(64, 8).bfloat16(), torch.randn(3, 8).bfloat16()
    out, scratch = torch.empty(3, 64), 10 * 8 * 4
    with Products() as products:
        Projection(weight, torch.float32, scratch).logits(hidden, 1.0, out)
    assert products.count == 7
    assert products.largest_copy <= scratch
    torch.testing.assert_close(out, hidden.float() @ weight.float().t())
