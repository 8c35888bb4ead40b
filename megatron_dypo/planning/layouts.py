"""Enumerate the layouts that ``plan --search`` compares. Pure arithmetic."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Literal

from megatron_dypo.config.model import ParallelConfig
from megatron_dypo.config.tree import Config
from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.layout_rules import check_fp8_sizes, check_layout
from megatron_dypo.planning.setting import Setting

MOST_STAGES = 16
MOST_CONTEXT = 8
Recompute = Literal["none", "full"]
_RECOMPUTE: tuple[Recompute, ...] = ("none", "full")


def layouts(setting: Setting, trainer_gpus: int) -> Iterator[Config]:
    """Yield the setting's config with every layout of the trainer that is possible on this many GPUs.

    Axes are powers of two; tensor-parallel ranks share a node. Stages may be uneven at both ends, and interleaved in
    two chunks. Layers are recomputed wholly or not at all, and microbatches have the config's tokens or the longest
    sequence.
    """
    arch, cfg = setting.arch, setting.config
    budgets = sorted({setting.longest_sequence, max(cfg.batching.tokens_per_microbatch, setting.longest_sequence)})
    for parallel in _axes(arch, cfg.parallel, setting.gpus_per_node, trainer_gpus):
        try:
            check_layout(arch, parallel)
            check_fp8_sizes(arch, parallel, cfg.model.fp8)
            parallel.mesh(trainer_gpus)
        except ValueError:
            continue
        for recompute, budget in itertools.product(_RECOMPUTE, budgets):
            yield dataclasses.replace(
                cfg,
                parallel=parallel,
                model=dataclasses.replace(cfg.model, recompute=recompute),
                batching=dataclasses.replace(cfg.batching, tokens_per_microbatch=budget),
                optimizer=dataclasses.replace(cfg.optimizer, distributed=True),
            )


def _axes(arch: Architecture, given: ParallelConfig, per_node: int, gpus: int) -> Iterator[ParallelConfig]:
    experts = _powers(arch.experts.num_experts) if arch.experts else [1]
    for tensor, pipeline, context in itertools.product(_powers(per_node), _powers(MOST_STAGES), _powers(MOST_CONTEXT)):
        replica = tensor * pipeline * context
        if gpus % replica:
            continue
        ends = end_stages(arch.num_layers, pipeline)
        if ends is None:
            continue
        for expert, chunks in itertools.product(experts, (None, 2) if pipeline > 1 else (None,)):
            if gpus // pipeline % expert:
                continue
            try:
                yield dataclasses.replace(
                    given,
                    num_processes=gpus,
                    tensor=tensor,
                    sequence=tensor > 1,
                    pipeline=pipeline,
                    context=context,
                    expert=expert,
                    expert_tensor=1,
                    expert_dispatcher=given.expert_dispatcher if expert > 1 else "alltoall",
                    virtual_pipeline=chunks,
                    first_stage_layers=ends or None,
                    last_stage_layers=ends or None,
                )
            except ValueError:
                continue


def end_stages(num_layers: int, pipeline: int) -> int | None:
    """Return the layers of the first and of the last stage, if they must have fewer than others; 0: all stages are
    equal; None: no such division."""
    if num_layers % pipeline == 0:
        return 0
    if pipeline <= 2:
        return None
    between = -(-num_layers // pipeline)
    rest = num_layers - between * (pipeline - 2)
    return rest // 2 if rest > 0 and rest % 2 == 0 else None


def _powers(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length()) if 2**power <= most]
