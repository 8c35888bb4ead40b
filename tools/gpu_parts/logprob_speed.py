"""Measure time and memory of log-probs from hidden states, forward and backward, in several variants.

``fused`` is this package's, ``megatron`` is Megatron's fused cross-entropy, and ``eager`` is plain torch. All get the
same response tokens and one rank's whole vocabulary, and make the gradients of hidden states and weight. ``megatron``
and ``eager`` make the logits of all tokens. ``liger`` is Liger-Kernel's fused linear cross-entropy, where it is
installed; it returns only the sum. The limit is the time of the matrix products alone: one product of the same
shape is timed too.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dypo.checks import require_positive
from megatron_dypo.objective.fused_logprobs import fused_logprobs
from megatron_dypo.parallel import device


@dataclass(frozen=True, kw_only=True)
class ProjectionSizes:
    """Shape of the output projection."""

    tokens: int = 16_384
    hidden: int = 4096
    vocab: int = 151_936
    rounds: int = 5

    def __post_init__(self) -> None:
        require_positive(self, "tokens", "hidden", "vocab", "rounds")


LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [N, H], weight [V, H], targets [N]) → log-probs [N]."""


def measure_logprobs(sizes: ProjectionSizes, dtype: torch.dtype, group: dist.ProcessGroup) -> dict[str, Any]:
    """Return variant → seconds (median) and GiB beyond the inputs; also the share of the limit that ``fused`` reaches.

    A variant that runs out of memory has ``out_of_memory`` instead.
    """
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    def fused(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor) -> Tensor:
        return fused_logprobs(hidden_NH, weight_VH, targets_N, vocab_size=sizes.vocab, with_entropy=False)[0]

    def eager(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor) -> Tensor:
        logp_NV = (hidden_NH @ weight_VH.t()).float().log_softmax(dim=-1)
        return logp_NV.gather(1, targets_N[:, None])[:, 0]

    def megatron(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor) -> Tensor:
        logits_N1V = (hidden_NH @ weight_VH.t())[:, None]
        loss_N1: Tensor = fused_vocab_parallel_cross_entropy(logits_N1V, targets_N[:, None], group)
        return -loss_N1[:, 0]

    inputs = _inputs(sizes, dtype)
    results: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch.")}
    variants = {"fused": fused, "eager": eager, "megatron": megatron, **_liger()}
    for name, function in variants.items():
        results[name] = _measure(function, inputs, sizes.rounds)
    hidden_NH, weight_VH, _ = (t.detach() for t in inputs)
    product_s = _seconds(lambda: hidden_NH @ weight_VH.t(), sizes.rounds)
    results["product_s"] = product_s
    results["product_flops_per_s"] = 2 * sizes.tokens * sizes.hidden * sizes.vocab / product_s
    # Four products: forward, forward again, and the two gradients.
    results["share_of_product_limit"] = 4 * product_s / results["fused"]["seconds"]
    return results


def _liger() -> dict[str, LogProbs]:
    """Return Liger-Kernel's variant, which returns the sum of all log-probs as [1]; {} without it or without a GPU."""
    if not device.on_gpu() or importlib.util.find_spec("liger_kernel") is None:
        return {}
    liger = importlib.import_module("liger_kernel.transformers")
    loss = liger.LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return {"liger": lambda hidden_NH, weight_VH, targets_N: -loss(weight_VH, hidden_NH, targets_N)[None]}


def _inputs(sizes: ProjectionSizes, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    where = device.device()
    hidden_NH = torch.randn(sizes.tokens, sizes.hidden, device=where, dtype=dtype)
    weight_VH = torch.randn(sizes.vocab, sizes.hidden, device=where, dtype=dtype) * sizes.hidden**-0.5
    targets_N = torch.randint(sizes.vocab, (sizes.tokens,), device=where)
    return hidden_NH.requires_grad_(), weight_VH.detach().requires_grad_(), targets_N


def _measure(function: LogProbs, inputs: tuple[Tensor, Tensor, Tensor], rounds: int) -> dict[str, Any]:
    hidden_NH, weight_VH, targets_N = inputs

    def both_ways() -> float:
        hidden_NH.grad = weight_VH.grad = None
        logp_N = function(hidden_NH, weight_VH, targets_N)
        logp_N.sum().backward()
        return float(logp_N.detach().double().sum()) / len(targets_N)

    gc.collect()
    device.reset_peak_memory()
    before = device.peak_memory_gib()
    try:
        mean = both_ways()
        seconds = _seconds(both_ways, rounds)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    finally:
        hidden_NH.grad = weight_VH.grad = None
    return {"seconds": seconds, "peak_gib": device.peak_memory_gib() - before, "mean_logp": mean}


def _seconds(call: Callable[[], object], rounds: int) -> float:
    """Return the median seconds of a call, after one call that is not counted."""
    times = []
    for _ in range(rounds + 1):
        device.synchronize()
        start = time.perf_counter()
        call()
        device.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
