"""A tiny run for the checks: a model folder with one tensor, a tokenizer of bytes, prompts, a config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from megatron_dypo.config.reading.load import load_config
from megatron_dypo.config.tree import Config
from tests.support.chat_families import FAMILIES, write_family

MODEL = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}


def approve(response: str, answer: str) -> bool:
    """Accept every response, as a verifier."""
    return True


def rows(count: int = 40) -> list[dict[str, Any]]:
    """Return sums with traces of two teachers; 15% of the second teacher's are wrong."""
    return [
        {
            "id": f"sum-{number}",
            "prompt": f"What is {number} + {number}?",
            "answer": str(2 * number),
            "source": "sums",
            "traces": {
                "careful": f"\\boxed{{{2 * number}}}",
                "hasty": f"It is \\boxed{{{2 * number + (number % 20 < 3)}}}",
            },
        }
        for number in range(count)
    ]


def write_rows(path: Path, found: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def write_case(folder: Path, *, model: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Path:
    """Write everything under ``folder``; ``model`` changes config.json, ``sections`` the config. Returns its path."""
    write_family(folder / "model", FAMILIES["qwen3"])
    (folder / "model" / "config.json").write_text(json.dumps({**MODEL, **(model or {})}))
    save_file({"lm_head.weight": np.zeros((2, 2), np.float32)}, folder / "model" / "model.safetensors")
    write_rows(folder / "train.jsonl", rows())
    held_out = [{"id": "new", "prompt": "What is 500 + 1?", "answer": "501"}]
    held_out += [{"id": "old", "prompt": " what is  7 + 7?", "answer": "14"}]
    write_rows(folder / "held_out.jsonl", held_out)
    config: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder / "run"), "steps": 2},
        "model": {"hf_path": str(folder / "model"), "dtype": "float32"},
        "data": {"prompts": [str(folder / "train.jsonl")], "max_prompt_tokens": 200, "max_trace_tokens": 100},
        "rollout": {"max_new_tokens": 64},
        "grading": {"verifier": "exact", "workers": 1},
        "eval": {"sets": {"held_out": {"path": str(folder / "held_out.jsonl")}}},
    }
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


def case(folder: Path, *, model: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Config:
    """Write a case and load its config."""
    return load_config(write_case(folder, model=model, **sections))
