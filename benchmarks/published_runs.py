"""The runs of ``published_steps.yaml`` as settings of the plan. ``plan_fit.py`` and tests read them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron_dypo.config.data import DataConfig
from megatron_dypo.config.fp8 import Fp8Config
from megatron_dypo.config.model import ModelConfig, ParallelConfig
from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.config.refit import RefitConfig
from megatron_dypo.config.rollout import RolloutConfig, ServersConfig
from megatron_dypo.config.run import CheckpointConfig
from megatron_dypo.config.training import BatchingConfig, OptimizerConfig
from megatron_dypo.config.tree import Config
from megatron_dypo.models.architecture import Architecture
from megatron_dypo.planning.constants import FITTED, Constants
from megatron_dypo.planning.devices import find_gpu
from megatron_dypo.planning.setting import Assumptions, Setting
from megatron_dypo.planning.shipped import shipped_architecture
from megatron_dypo.planning.step import step_time
from megatron_dypo.planning.training import update_time

FILE = Path(__file__).with_name("published_steps.yaml")
PROMPT_TOKENS = 100
_DEALT = ("fit", "test", "test", "fit")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One published setting."""

    name: str
    kind: Literal["step", "update"]
    half: str
    """``fit`` or ``test``."""
    measured: float
    """Seconds; the geometric mean if it was published several times."""
    setting: Setting
    updates: int
    """Optimizer updates in the time."""

    def planned(self, constants: Constants = FITTED) -> float:
        """Return the seconds that the plan gives with these constants."""
        setting = replace(self.setting, constants=constants)
        seconds = step_time(setting).total if self.kind == "step" else update_time(setting).total
        return self.updates * seconds

    def error(self, constants: Constants = FITTED) -> float:
        """Return ln(planned / measured)."""
        return math.log(self.planned(constants) / self.measured)


def published_runs() -> list[Run]:
    """Return all settings, in the file's order."""
    lists = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    steps = [_step(row, _DEALT[i % 4]) for i, row in enumerate(lists["steps"])]
    return steps + [_update(row, _DEALT[i % 4]) for i, row in enumerate(lists["updates"])]


def _step(row: dict[str, Any], half: str) -> Run:
    servers, tensor = row["servers"]
    limit, response = row["limit"] - PROMPT_TOKENS, row["mean_tokens"] - PROMPT_TOKENS
    is_async = row["mode"] == "async"
    data = ParallelConfig(**row["axes"]).mesh(row["trainer_gpus"]).data
    in_flight = row["prompts"] * row["group"] * row.get("steps_in_flight", 1)
    config = Config(
        model=_model(row),
        parallel=ParallelConfig(**row["axes"]),
        data=DataConfig(prompts=("none",), max_prompt_tokens=PROMPT_TOKENS, max_trace_tokens=1),
        objective=ObjectiveConfig(importance=replace(ObjectiveConfig().importance, cap=2.0)),
        rollout=RolloutConfig(
            group_size=row["group"],
            prompts_per_round=row["prompts"],
            max_new_tokens=limit,
            mode="async" if is_async else "sync",
            oversample=8.0 * row.get("steps_in_flight", 1) if is_async else 1.0,
            max_in_flight=math.ceil(in_flight / data),
            servers=ServersConfig(tensor_parallel=tensor, nodes=servers, mem_fraction=row["mem_fraction"]),
        ),
        batching=BatchingConfig(
            prompts_per_update=row["prompts"] // row["updates"],
            updates_per_batch=row["updates"],
            tokens_per_microbatch=row["limit"],
        ),
        optimizer=OptimizerConfig(distributed=True, overlap_grad_reduce=True, overlap_param_gather=True),
        refit=RefitConfig(transport="broadcast", offload_servers=not is_async),
        checkpoint=CheckpointConfig(every=0),
    )
    figures = list(row["measured"].values())
    return Run(
        name=row["name"],
        kind="step",
        half=half,
        measured=math.prod(figures) ** (1 / len(figures)),
        updates=row["updates"],
        setting=Setting(
            config=config,
            arch=_architecture(row),
            gpu=find_gpu(row["gpu"]),
            gpus_per_node=72 if row["gpu"].startswith("gb200") else 8,
            trainer_gpus=row["trainer_gpus"],
            num_servers=servers,
            assumed=Assumptions(prompt_tokens=PROMPT_TOKENS, response_tokens=response, easy=0.0, hard=0.0),
            frees_trainer=not is_async,
            output_passes=3,
        ),
    )


def _update(row: dict[str, Any], half: str) -> Run:
    length, gpus, is_nemo = row["length"], row["gpus"], row["source"] != "korthikanti"
    config = Config(
        model=_model(row),
        parallel=ParallelConfig(**row["axes"], megatron=row.get("megatron", {})),
        data=DataConfig(prompts=("none",), max_prompt_tokens=1, max_trace_tokens=length - 1),
        rollout=RolloutConfig(max_new_tokens=length - 1),
        batching=BatchingConfig(prompts_per_update=row["batch"], tokens_per_microbatch=length * row["microbatch"]),
        optimizer=OptimizerConfig(distributed=is_nemo, overlap_grad_reduce=is_nemo, overlap_param_gather=is_nemo),
    )
    measured = row["measured"]
    seconds = measured.get("seconds") or row["batch"] * length / (measured["tokens"] * gpus)
    return Run(
        name=row["name"],
        kind="update",
        half=half,
        measured=seconds,
        updates=1,
        setting=Setting(
            config=config,
            arch=_architecture(row),
            gpu=find_gpu(row["gpu"]),
            gpus_per_node=8,
            trainer_gpus=gpus,
            num_servers=1,
            assumed=Assumptions(prompt_tokens=1, response_tokens=length - 1, easy=0.0, hard=1.0),
            output_passes=3,
            balanced_output=row.get("output") == "balanced",
        ),
    )


def _model(row: dict[str, Any]) -> ModelConfig:
    recipe = row.get("fp8")
    fp8 = Fp8Config(recipe=recipe) if recipe else Fp8Config()
    overlap = {"tp_comm_overlap": True} if row.get("tp_comm_overlap") else {}
    recompute = row.get("recompute", "none")
    return ModelConfig(hf_path="none", dtype="bfloat16", recompute=recompute, fp8=fp8, megatron=overlap)


def _architecture(row: dict[str, Any]) -> Architecture:
    if "model" in row:
        arch = shipped_architecture(row["model"])
        return replace(arch, num_layers=row.get("layers", arch.num_layers))
    hidden, heads = row["sizes"]["hidden_size"], row["sizes"]["num_attention_heads"]
    # GPT's layers have 12·H² parameters; a gated feed-forward layer has as many with F = 8·H/3.
    return Architecture(
        **row["sizes"],
        family="llama",
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        ffn_hidden_size=8 * hidden // 3 // 64 * 64,
        vocab_size=51_200,
        max_position_embeddings=2048,
        norm_epsilon=1e-5,
        rope_theta=10_000.0,
        rope_scaling=None,
        tied_embeddings=False,
        qkv_bias=False,
        qk_norm=False,
    )
