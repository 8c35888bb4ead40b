"""Run one rank of a case of ``memory_model.py``: a real update, its live tensors, and the model's prediction."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from live_bytes import LiveBytes, distinct_bytes

from megatron_dypo.batching.pack import pack
from megatron_dypo.config.data import DataConfig
from megatron_dypo.config.model import ModelConfig, ParallelConfig
from megatron_dypo.config.rollout import RolloutConfig
from megatron_dypo.config.training import BatchingConfig, OptimizerConfig
from megatron_dypo.config.tree import Config
from megatron_dypo.mcore import features
from megatron_dypo.mcore.start import start_megatron
from megatron_dypo.models.architecture import Architecture, architecture_from_hf
from megatron_dypo.objective.recipes.registry import build_objective
from megatron_dypo.parallel.groups import MeshRank, close
from megatron_dypo.planning.devices import find_gpu
from megatron_dypo.planning.memory import trainer_footprints
from megatron_dypo.planning.setting import Assumptions, Setting
from megatron_dypo.types import Microbatch, Sample, SampleKind, Treatment


def answer(case: Any) -> None:
    """Measure and predict; on the first rank, print the results of all ranks as JSON."""
    features.shield_imports()
    config = configuration(case)
    layout = start_megatron(config.parallel)
    arch = architecture(case)
    mine = measured(case, config, arch, layout), modelled(case, config, arch, layout)
    everybody: list[Any] = [None] * layout.world_size
    dist.all_gather_object(everybody, mine)
    if layout.is_global_leader:
        print(json.dumps(everybody), flush=True)
    close(layout)


def configuration(case: Any) -> Config:
    length = case.row // case.sequences
    return Config(
        model=ModelConfig(hf_path="none", dtype=case.dtype, recompute=case.recompute),
        parallel=ParallelConfig(**case.parallel),
        data=DataConfig(prompts=("none",), max_prompt_tokens=1, max_trace_tokens=length - 1),
        rollout=RolloutConfig(max_new_tokens=length - 1),
        batching=BatchingConfig(tokens_per_microbatch=case.row, prompts_per_update=case.rows * case.sequences),
        optimizer=OptimizerConfig(distributed=case.distributed),
    )


def modelled(case: Any, config: Config, arch: Architecture, layout: MeshRank) -> dict[str, float]:
    """Return the model's prediction for this rank's stage."""
    config = dataclasses.replace(
        config,
        batching=dataclasses.replace(config.batching, prompts_per_update=layout.data * case.rows * case.sequences),
    )
    setting = Setting(
        config=config,
        arch=arch,
        gpu=find_gpu("h100-80gb"),
        gpus_per_node=8,
        trainer_gpus=layout.world_size,
        num_servers=1,
        # All prompts are Hard, so that each gives one sequence.
        assumed=Assumptions(prompt_tokens=1, response_tokens=case.row // case.sequences - 1, easy=0.0, hard=1.0),
        fused=False,
        on_gpu=False,
    )
    footprint = trainer_footprints(setting)[layout.pp_rank]
    state = {name: footprint[name] for name in ("parameters", "gradients", "optimizer")}
    return {**state, "activations": footprint.total - sum(state.values()), "peak": footprint.total}


def measured(case: Any, config: Config, arch: Architecture, layout: MeshRank) -> dict[str, float]:
    """Return the live bytes of the second update, in which the optimizer has its state."""
    from megatron_dypo.mcore.forward_step import loss_pass
    from megatron_dypo.mcore.model import build_model
    from megatron_dypo.mcore.optimizer import build_optimizer

    live, rows = LiveBytes(), packed_rows(case)
    with live:
        chunks = build_model(
            arch, config.model, config.parallel, layout, distributed_optimizer=config.optimizer.distributed
        )
        parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        for parameter in parameters:
            torch.nn.init.normal_(parameter, std=0.02)
        optimizer = build_optimizer(chunks, config.optimizer, dtype=config.model.dtype, total_steps=10)
        for _ in range(2):
            optimizer.zero_grad()
            live.reset_peak()
            loss_pass(chunks, rows, objective=build_objective(config.objective), context_group=layout.cp_group)
            peak = live.peak
            assert optimizer.step().ok
    state = {
        "parameters": distinct_bytes(parameters),
        "gradients": sum(b.grad_data.nbytes for c in chunks for b in (*c.buffers, *c.expert_parallel_buffers)),
        "optimizer": distinct_bytes([*parameters, *optimizer_tensors(optimizer)]) - distinct_bytes(parameters),
    }
    return {**state, "activations": peak - sum(state.values()), "peak": peak}


def optimizer_tensors(optimizer: Any) -> Iterator[torch.Tensor]:
    """Yield the main parameters and moments. In an fp32 model the main parameters are the parameters themselves."""
    for chained in optimizer.megatron.chained_optimizers:
        for group in chained.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter
                yield from (v for v in chained.optimizer.state[parameter].values() if torch.is_tensor(v))


def packed_rows(case: Any) -> list[Microbatch]:
    generator = np.random.default_rng(0)
    samples = list(map(partial(_sample, case, generator), range(case.rows * case.sequences)))
    starts = range(0, len(samples), case.sequences)
    return [pack(samples, range(start, start + case.sequences), case.row) for start in starts]


def _sample(case: Any, generator: Any, index: int) -> Sample:
    length = case.row // case.sequences
    return Sample(
        order=index,
        member=0,
        treatment=Treatment.DISTILL,
        kind=SampleKind.TRACE,
        tokens=generator.integers(3, case.vocab, length).astype(np.int32),
        num_prompt_tokens=1,
        policy_version=0,
        weights={"nll_weight": 1e-3},
    )


def architecture(case: Any) -> Architecture:
    raw = {
        "model_type": case.family,
        "num_hidden_layers": case.layers,
        "hidden_size": case.hidden,
        "num_attention_heads": case.hidden // 64,
        "num_key_value_heads": case.kv_heads,
        "head_dim": 64,
        "intermediate_size": case.ffn,
        "vocab_size": case.vocab,
        "max_position_embeddings": 4096,
    }
    if case.experts:
        raw |= {
            "num_experts": case.experts,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": case.ffn,
            "norm_topk_prob": True,
        }
    if case.family == "deepseek_v3":
        raw |= {
            "num_key_value_heads": case.hidden // 64,
            "n_routed_experts": case.experts,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 96,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
        }
    if case.family == "glm4_moe":
        raw |= {"n_routed_experts": case.experts, "attention_bias": True, "use_qk_norm": True}
    if case.family == "gpt_oss":
        raw |= {"num_local_experts": case.experts, "sliding_window": 64}
    return architecture_from_hf(raw, where=case.name)
