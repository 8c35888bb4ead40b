"""Settings for tests of the plan."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from megatron_dypo.config.data import DataConfig
from megatron_dypo.config.model import ModelConfig, ParallelConfig
from megatron_dypo.config.reading.load import load_config
from megatron_dypo.config.rollout import RolloutConfig
from megatron_dypo.config.training import BatchingConfig
from megatron_dypo.config.tree import Config
from megatron_dypo.models.architecture import Architecture
from megatron_dypo.planning.devices import find_gpu
from megatron_dypo.planning.setting import Assumptions, Setting, make_setting

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "tests" / "planning_configs"


def architecture(**changes: Any) -> Architecture:
    """Make a Llama-like decoder whose layers have 12·H² parameters, as GPT's have: F = 8·H/3, rounded."""
    hidden = changes.get("hidden_size", 768)
    sizes: dict[str, Any] = {
        "family": "llama",
        "num_layers": 8,
        "hidden_size": hidden,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "head_dim": hidden // changes.get("num_attention_heads", 12),
        "ffn_hidden_size": 8 * hidden // 3 // 64 * 64,
        "vocab_size": 51_200,
        "max_position_embeddings": 2048,
        "norm_epsilon": 1e-5,
        "rope_theta": 10_000.0,
        "rope_scaling": None,
        "tied_embeddings": False,
        "qkv_bias": False,
        "qk_norm": False,
    }
    return Architecture(**(sizes | changes))


def pretraining(
    arch: Architecture,
    parallel: dict[str, Any],
    *,
    gpus: int,
    batch: int,
    row_sequences: int = 1,
    length: int = 2048,
    recompute: Literal["none", "selective", "full"] = "selective",
) -> Setting:
    """Make a setting on A100s with ``batch`` sequences of ``length`` in an update, all of them responses."""
    config = Config(
        model=ModelConfig(hf_path="none", recompute=recompute),
        parallel=ParallelConfig(**parallel),
        data=DataConfig(prompts=("none",), max_prompt_tokens=1, max_trace_tokens=length - 1),
        rollout=RolloutConfig(max_new_tokens=length - 1),
        batching=BatchingConfig(prompts_per_update=batch, tokens_per_microbatch=length * row_sequences),
    )
    return Setting(
        config=config,
        arch=arch,
        gpu=find_gpu("a100-80gb"),
        gpus_per_node=8,
        trainer_gpus=gpus,
        num_servers=1,
        assumed=Assumptions(prompt_tokens=1, response_tokens=length - 1, easy=0.0, hard=1.0),
    )


def from_file(name: str, *overrides: str, gpu: str = "h100-80gb", **options: Any) -> Setting:
    """Return the setting of ``tests/planning_configs/<name>.yaml``."""
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    model = dataclasses.replace(config.model, hf_path=str(ROOT / config.model.hf_path))
    return make_setting(dataclasses.replace(config, model=model), find_gpu(gpu), **options)
