"""Compare the gradients of two ranks, in each layout, with those of one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dypo.models.random_model import write_random_model
from tools.gpu_parts.run_part import Part, run_part
from tools.gpu_parts.synthetic import Dtype

LAYOUTS: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "dense": {
        "TP2": {"tensor": 2},
        "TP2, SP": {"tensor": 2, "sequence": True},
        "PP2": {"pipeline": 2},
        "CP2": {"context": 2},
    },
    "mixture": {"EP2": {"expert": 2}, "experts, TP2, SP": {"tensor": 2, "sequence": True}},
}
"""Model → name → axes of a layout of two ranks."""
COSINE_BAR, NORM_BAR = {"float32": 1 - 1e-6, "bfloat16": 0.995}, {"float32": 1e-4, "bfloat16": 0.02}
_SEED = 1


def compare_layouts(work: Path, dtype: Dtype, *, run_part: Part = run_part) -> dict[str, Any]:
    """Return layout → least cosine and largest relative gap of norms against one GPU, and the verdicts."""
    found: dict[str, Any] = {}
    verdicts = {}
    for kind, layouts in LAYOUTS.items():
        model = work / kind
        write_random_model(model, _config(kind), seed=_SEED)
        spec = {"what": "layout", "model": str(model), "dtype": dtype}
        alone = np.asarray(run_part({**spec, "parallel": {}})["scores"])
        for name, axes in layouts.items():
            scores = np.asarray(run_part({**spec, "parallel": axes}, ranks=2)["scores"])
            norms, own = np.linalg.norm(alone, axis=1), np.linalg.norm(scores, axis=1)
            cosine = float(((alone * scores).sum(axis=1) / (norms * own)).min())
            gap = float(np.abs(own / norms - 1).max())
            found[name] = {"cosine": cosine, "norm_gap": gap}
            verdicts[f"{name}: gradients of one GPU"] = cosine >= COSINE_BAR[dtype] and gap <= NORM_BAR[dtype]
    return {"layouts": found, "verdicts": verdicts}


def _config(kind: str) -> dict[str, Any]:
    """Return the ``config.json`` of a small model that every axis of its layouts can split."""
    experts = {"moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
    return {
        "model_type": "qwen3_moe" if kind == "mixture" else "qwen3",
        "architectures": ["Qwen3MoeForCausalLM" if kind == "mixture" else "Qwen3ForCausalLM"],
        **(experts if kind == "mixture" else {}),
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 512,
        "vocab_size": 1024,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }
