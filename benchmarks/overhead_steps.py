"""Run, on one rank, the steps that ``step_overhead.py`` compares."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import measure
import numpy as np
import torch
import torch.distributed as dist

from megatron_dypo.batching.pack import microbatch_length, pack, plan_microbatches
from megatron_dypo.config.model import ModelConfig, ParallelConfig
from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.config.training import OptimizerConfig
from megatron_dypo.mcore import features
from megatron_dypo.mcore.start import start_megatron
from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.flops import sequence_cost
from megatron_dypo.objective.recipes.registry import build_objective
from megatron_dypo.objective.totals import add_counts, count_groups
from megatron_dypo.parallel.groups import MeshRank, close
from megatron_dypo.types import Microbatch, Sample, SampleKind, Treatment

VARIANTS = ("dypo", "sft", "sft_unfused")
OBJECTIVE = ObjectiveConfig()


def answer(what: str, shape: Any, rounds: int) -> None:
    """Measure; print the result as one JSON object on the first rank."""
    features.shield_imports()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    parallel = ParallelConfig(tensor=size)
    layout = start_megatron(parallel)
    kind, _, variant = what.partition(":")
    result = (
        measure_time(shape, parallel, layout, rounds)
        if kind == "time"
        else measure_memory(shape, parallel, layout, variant)
    )
    if layout.is_global_leader:
        print(json.dumps(result), flush=True)
    close(layout)


def measure_time(shape: Any, parallel: ParallelConfig, layout: MeshRank, rounds: int) -> dict[str, Any]:
    """Return the seconds of each variant by round, and of the work besides the update: log-probs, weights, packing."""
    from megatron_dypo.mcore.logprobs import sequence_logprobs

    bench = Bench(shape, parallel, layout)
    steps = {variant: partial(bench.step, variant) for variant in VARIANTS}
    measure.interleaved(steps, 1)
    budget = max(len(row.tokens_T) for row in bench.rows)
    samples = [s for group in bench.groups for s in group if s.treatment is Treatment.REINFORCE]
    beside: dict[str, Callable[[], object]] = {
        "scoring": partial(sequence_logprobs, bench.chunks, samples, layout=layout, budget=budget),
        "weights": partial(token_weights, bench.groups),
        "packing": partial(pack_microbatches, token_weights(bench.groups), shape.rows, bench.arch, layout),
    }
    beside_wall, _ = measure.interleaved(beside, 3)
    wall, cpu = measure.interleaved(steps, rounds)
    return {
        "wall": wall,
        "cpu": cpu,
        "tokens": sum(len(row.tokens_T) for row in bench.rows),
        **{name: float(np.median(values)) for name, values in beside_wall.items()},
    }


def measure_memory(shape: Any, parallel: ParallelConfig, layout: MeshRank, variant: str) -> dict[str, int]:
    """Return the peak growth of a rank's resident set over two updates; the largest over all ranks."""
    from megatron_dypo.mcore import forward_step, model, optimizer  # noqa: F401, before the start: imports do not count

    start = measure.resident_bytes()
    bench = Bench(shape, parallel, layout)
    bench.step(variant)
    held = measure.resident_bytes()
    measure.reset_peak()
    bench.step(variant)
    growth = torch.tensor([measure.peak_bytes() - start, measure.peak_bytes() - held])
    dist.all_reduce(growth, op=dist.ReduceOp.MAX)
    return dict(zip(("total", "step"), growth.tolist(), strict=True))


class Bench:
    """A model with its optimizer, and the microbatches of one update."""

    def __init__(self, shape: Any, parallel: ParallelConfig, layout: MeshRank) -> None:
        from megatron_dypo.mcore.model import build_model
        from megatron_dypo.mcore.optimizer import build_optimizer

        self.arch = architecture(shape)
        model = ModelConfig(hf_path="none", dtype="float32")
        self.chunks = build_model(self.arch, model, parallel, layout)
        torch.manual_seed(1)
        for name, parameter in self.chunks[0].named_parameters():
            parameter.data.fill_(1.0) if "norm" in name else parameter.data.normal_(0, 0.02)
        self.optimizer = build_optimizer(self.chunks, OptimizerConfig(), dtype="float32", total_steps=100)
        self.groups = draw_groups(shape)
        self.rows = pack_microbatches(token_weights(self.groups), shape.rows, self.arch, layout)

    def step(self, variant: str) -> None:
        """Make one update."""
        from megatron_dypo.mcore.forward_step import loss_pass

        self.optimizer.zero_grad()
        if variant == "dypo":
            loss_pass(self.chunks, self.rows, objective=build_objective(OBJECTIVE))
        else:
            cross_entropy_pass(self.chunks, self.rows, fused=variant == "sft")
        assert self.optimizer.step().ok


def cross_entropy_pass(chunks: Sequence[Any], rows: Sequence[Microbatch], *, fused: bool) -> None:
    """Run Megatron's schedule with its own GPTModel and loss. PolicyModel differs from GPTModel in one method."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_dypo.mcore.attention import packed_seq_params
    from megatron_dypo.mcore.chunks import unwrap

    model = unwrap(chunks[0])
    ours, model.__class__ = model.__class__, GPTModel
    model.config.cross_entropy_loss_fusion, model.config.cross_entropy_fusion_impl = fused, "native"
    num_tokens = sum(int(row.response_T.sum()) for row in rows)

    def forward_step(iterator: Iterator[Microbatch], chunk: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        row = next(iterator)
        tokens, positions, labels = (
            torch.from_numpy(x.astype(np.int64))[None] for x in (row.tokens_T, row.positions_T, row.targets_T)
        )
        packed = packed_seq_params(torch.from_numpy(row.cu_seqlens_S))
        return chunk(tokens, positions, None, packed_seq_params=packed, labels=labels), partial(
            masked_mean, torch.from_numpy(row.response_T).float()
        )

    def masked_mean(mask_T: torch.Tensor, loss_1T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        loss = (loss_1T[0] * mask_T).sum() / num_tokens
        return loss, torch.tensor(1, dtype=torch.int), loss.detach().clone()

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(rows)],
        model=list(chunks),
        num_microbatches=len(rows),
        seq_length=len(rows[0].tokens_T),
        micro_batch_size=1,
        forward_only=False,
    )
    model.__class__ = ours


def architecture(shape: Any) -> Architecture:
    heads = shape.hidden // 64
    return Architecture(
        family="qwen3",
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=heads,
        num_key_value_heads=2,  # divided between the two tensor-parallel ranks
        head_dim=64,
        ffn_hidden_size=shape.ffn,
        vocab_size=shape.vocab,
        max_position_embeddings=4096,
        norm_epsilon=1e-6,
        rope_theta=10_000.0,
        rope_scaling=None,
        tied_embeddings=False,
        qkv_bias=False,
        qk_norm=True,
    )


def draw_groups(shape: Any) -> list[list[Sample]]:
    """Draw Mid groups, in which half of the rollouts are right, and teachers' traces."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(shape.length), 0.3, shape.rollouts + shape.traces), 8, None).astype(int)
    draw = partial(_sample, rng, shape)
    rollouts = [draw(i // shape.group_size, i % shape.group_size, lengths[i]) for i in range(shape.rollouts)]
    groups = [rollouts[start : start + shape.group_size] for start in range(0, shape.rollouts, shape.group_size)]
    for length in lengths[shape.rollouts :]:
        groups.append([draw(len(groups), 0, length, is_trace=True)])
    return groups


def _sample(rng: Any, shape: Any, order: int, member: int, length: int, *, is_trace: bool = False) -> Sample:
    prompt = max(1, round(shape.prompt_share * length))
    old = rng.normal(-np.log(shape.vocab), 0.1, length - prompt).astype(np.float32)
    return Sample(
        order=order,
        member=member,
        treatment=Treatment.DISTILL if is_trace else Treatment.REINFORCE,
        kind=SampleKind.TRACE if is_trace else SampleKind.ROLLOUT,
        tokens=rng.integers(3, shape.vocab, length).astype(np.int32),
        num_prompt_tokens=prompt,
        policy_version=0,
        is_correct=not is_trace and member % 2 == 0,
        reward=float(member % 2 == 0),
        rollout_logp=None if is_trace else old,
        old_logp=None if is_trace else old,
        ref_logp=None if is_trace else old + rng.normal(0, 0.1, len(old)).astype(np.float32),
    )


def token_weights(groups: Sequence[Sequence[Sample]]) -> list[Sample]:
    """Return every sample with its token weights."""
    totals = add_counts([count_groups(groups)])
    objective = build_objective(OBJECTIVE)
    return [
        dataclasses.replace(sample, weights=weights)
        for group in groups
        for sample, weights in zip(group, objective.token_weights(group, totals, 0).weights, strict=True)
    ]


def pack_microbatches(samples: Sequence[Sample], count: int, arch: Architecture, layout: MeshRank) -> list[Microbatch]:
    lengths, cost = [len(s.tokens) for s in samples], sequence_cost(arch)
    bins = plan_microbatches(lengths, budget=sum(lengths), count=count, costs=[cost.of(s) for s in samples])
    return [pack(samples, members, microbatch_length(lengths, [members], layout.tensor)) for members in bins]
