"""Make DYPO updates of a synthetic policy on fixed samples in one precision, and measure their results and cost.

All steps from samples to updated weights are those of a run: the pass for log-probs, the objective's weights, packing
with the recipe's alignment, ``loss_pass`` and the optimizer. There are no servers, no data and no other replicas.
"""

from __future__ import annotations

import itertools
import statistics
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_dypo.batching.pack import num_microbatches, plan_microbatches
from megatron_dypo.config.fp8 import Fp8Config
from megatron_dypo.config.model import ModelConfig, ParallelConfig
from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.config.training import OptimizerConfig
from megatron_dypo.mcore.chunks import named_global_parameters
from megatron_dypo.mcore.forward_step import loss_pass
from megatron_dypo.mcore.logprobs import pack_microbatches, sequence_logprobs
from megatron_dypo.mcore.model import build_model
from megatron_dypo.mcore.optimizer import PolicyOptimizer, build_optimizer
from megatron_dypo.models.flops import sequence_cost
from megatron_dypo.objective.recipes.registry import build_objective
from megatron_dypo.objective.streams import STREAMS
from megatron_dypo.parallel import device
from megatron_dypo.parallel.groups import MeshRank
from megatron_dypo.types import Floats, Microbatch, Sample, Treatment
from tools.gpu_parts.synthetic import CheckSizes, Dtype, architecture, count, make_samples

OBJECTIVE = ObjectiveConfig()
LEARNING_RATE = 1e-5


@dataclass(frozen=True, kw_only=True)
class UpdateRun:
    """Numbers of one precision; ``step_s`` is the median without the first update."""

    losses: list[float]
    """Loss of each update: surrogate + KL + distillation."""
    grad_norms: list[float]
    step_s: float
    tokens_per_s: float
    model_flops_per_s: float
    """FLOPs that the model needs, per second, without the output projection's second forward pass."""
    score_s: float
    peak_gib: float


def run_updates(sizes: CheckSizes, layout: MeshRank, *, dtype: Dtype, fp8: Fp8Config, keep: Path) -> UpdateRun:
    """Compute log-probs once, then make ``sizes.steps`` updates on the same samples.

    Args:
        keep: file for the tensors by which precisions are compared: those log-probs and the first update's gradient.

    Raises:
        ValueError: the recipe does not suit the sizes or the machine.
    """
    device.reset_peak_memory()
    chunks, optimizer = build_policy(sizes, layout, dtype, fp8)
    samples = make_samples(sizes)
    start = _now()
    logp = score(chunks, samples, sizes, layout, fp8)
    score_s = _now() - start
    rows = pack_samples(samples, logp, sizes, layout, fp8)
    losses, norms, seconds = [], [], []
    for step in range(sizes.steps):
        start = _now()
        optimizer.zero_grad()
        losses.append(backward(chunks, rows))
        if step == 0:
            torch.save({"logp": torch.from_numpy(np.concatenate(logp)), "gradient": _gradient(chunks)}, keep)
        norms.append(optimizer.step().grad_norm)
        seconds.append(_now() - start)
    step_s = statistics.median(seconds[1:] or seconds)
    cost = sequence_cost(architecture(sizes))
    needed = replace(cost, response=cost.response * 3 / 4)
    return UpdateRun(
        losses=losses,
        grad_norms=norms,
        step_s=step_s,
        tokens_per_s=sum(len(sample.tokens) for sample in samples) / step_s,
        model_flops_per_s=sum(needed.of(sample) for sample in samples) / step_s,
        score_s=score_s,
        peak_gib=device.peak_memory_gib(),
    )


def build_policy(
    sizes: CheckSizes, layout: MeshRank, dtype: Dtype, fp8: Fp8Config
) -> tuple[list[Any], PolicyOptimizer]:
    """Return the model chunks, with the same weights on every machine, and their optimizer."""
    model = ModelConfig(hf_path="synthetic", dtype=dtype, fp8=fp8)
    chunks = build_model(architecture(sizes), model, ParallelConfig(), layout)
    _fill_weights(chunks)
    config = OptimizerConfig(lr=LEARNING_RATE)
    return chunks, build_optimizer(chunks, config, dtype=dtype, total_steps=sizes.steps, fp8=fp8)


def score(
    chunks: Sequence[Any], samples: Sequence[Sample], sizes: CheckSizes, layout: MeshRank, fp8: Fp8Config
) -> list[Floats]:
    """Return log π of each sample's response tokens, [R]."""
    logp = sequence_logprobs(chunks, samples, layout=layout, budget=_budget(sizes), token_multiple=fp8.token_multiple)
    assert logp is not None, "one rank leads itself"
    return logp


def pack_samples(
    samples: Sequence[Sample], logp: Sequence[Floats], sizes: CheckSizes, layout: MeshRank, fp8: Fp8Config
) -> list[Microbatch]:
    """Return the samples' microbatches with the objective's weights; ``logp`` is both log π_old and log π_ref."""
    return _pack(_token_weights(samples, logp), layout, _budget(sizes), fp8.token_multiple)


def backward(chunks: Sequence[Any], rows: Sequence[Microbatch]) -> float:
    """Add the gradient of the whole objective to the main gradients, and return surrogate + KL + distillation."""
    sums = loss_pass(chunks, rows, objective=build_objective(OBJECTIVE))
    return float(sums["pg"] + sums["kl"] + sums["sft"])


def _budget(sizes: CheckSizes) -> int:
    """Return the tokens of a microbatch."""
    return max(sizes.tokens // 2, sizes.length)


@torch.no_grad()
def _fill_weights(chunks: Sequence[Any]) -> None:
    """Set norms to one, and draw matrices from a normal distribution (std 0.02), each with the seed of its name."""
    for name, parameter in named_global_parameters(chunks):
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def _token_weights(samples: Sequence[Sample], logp: Sequence[Floats]) -> list[Sample]:
    """Return the samples with the objective's weights; π_old and π_ref are both the current policy."""
    objective, totals = build_objective(OBJECTIVE), count(samples)
    for sample, own in zip(samples, logp, strict=True):
        sample.old_logp = sample.ref_logp = own
        if sample.treatment is Treatment.REINFORCE:
            sample.rollout_logp = own
    weighted: list[Sample] = []
    for _, members in itertools.groupby(samples, key=lambda sample: sample.order):
        group = list(members)
        weights = objective.token_weights(group, totals, 0).weights
        weighted += [replace(sample, weights=weight) for sample, weight in zip(group, weights, strict=True)]
    return weighted


def _pack(samples: Sequence[Sample], layout: MeshRank, budget: int, token_multiple: int) -> list[Microbatch]:
    lengths = [len(sample.tokens) for sample in samples]
    bins = plan_microbatches(lengths, budget=budget, count=num_microbatches(lengths, budget=budget))
    return pack_microbatches(samples, bins, layout, token_multiple=token_multiple, streams=STREAMS)


def _gradient(chunks: Sequence[Any]) -> torch.Tensor:
    """Return the whole gradient in bf16 on the CPU, in the order of the parameters."""
    parameters: list[Any] = [parameter for _, parameter in named_global_parameters(chunks)]
    return torch.cat([parameter.main_grad.flatten().to("cpu", torch.bfloat16) for parameter in parameters])


def _now() -> float:
    device.synchronize()
    return time.perf_counter()
