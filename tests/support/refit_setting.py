"""The setting of tests of refits to two fake servers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_dypo.refit.refitter import Refitter
from tests.support.fake_control import FakeServer

HF_CONFIG = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 24,
    "vocab_size": 31,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


@dataclasses.dataclass
class Lost:
    """The servers that their owner reports as lost."""

    deaths: dict[str, str] = dataclasses.field(default_factory=dict)
    may_return: bool = False
    is_stopping: bool = False

    def take(self) -> dict[str, str]:
        deaths, self.deaths = self.deaths, {}
        return deaths


@dataclasses.dataclass
class Setting:
    servers: list[FakeServer]
    params: dict[str, torch.Tensor]
    refitter: Refitter
    refit: Path
    reference: Path
    lost: Lost

    def weights_on_disk(self, version: int) -> dict[str, torch.Tensor]:
        return load_file(self.refit / f"version_{version}" / "model.safetensors")
