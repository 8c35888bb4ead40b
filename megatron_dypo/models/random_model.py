"""A model folder with random weights, of any family with a name table, for training from scratch and for tests."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_dypo.models.architecture import Architecture, architecture_from_hf
from megatron_dypo.models.families.registry import family_rows


def write_random_model(folder: Path, hf_config: Mapping[str, Any], seed: int) -> int:
    """Write ``config.json``, ``generation_config.json`` and fp32 weights, but no tokenizer.

    ``config.json`` is written last, so a folder with that file is complete.

    Args:
        folder: made if it does not exist.
        hf_config: content of ``config.json``.

    Returns:
        The number of parameters.

    Raises:
        ValueError: a config that :func:`megatron_dypo.models.architecture.architecture_from_hf` refuses.
    """
    path = folder / "config.json"
    weights = random_weights(architecture_from_hf(hf_config, where=str(path)), seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokens = {name: value for name, value in hf_config.items() if name.endswith("_token_id")}
    for file, content in ((folder / "generation_config.json", tokens), (path, hf_config)):
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return sum(weight.numel() for weight in weights.values())


def random_weights(arch: Architecture, seed: int) -> dict[str, torch.Tensor]:
    """Return random weights: HF name → fp32 tensor.

    Matrices are normal with standard deviation 1/√fan-in. The embedding has standard deviation 1, or 1/√hidden if it is
    also the output layer. Norms are one and biases zero. Small models learn much faster from this than from the usual
    0.02.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for row in family_rows(arch):
        if row.is_copy:
            continue
        for name, shape in zip(row.hf, row.rule.hf_shapes(arch), strict=True):
            if len(shape) == 1:
                weights[name] = torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
            else:
                is_lookup = row.mcore.startswith("embedding.") and not arch.tied_embeddings
                scale = 1.0 if is_lookup else 1 / math.sqrt(shape[1])
                weights[name] = torch.randn(shape, generator=generator) * scale
    return weights
