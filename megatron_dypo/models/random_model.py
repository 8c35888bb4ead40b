"""Random weights of any family with a name table: a model folder for training from scratch and for tests, or the
parameters of one rank."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_dypo.models.architecture import Architecture, architecture_from_hf
from megatron_dypo.models.families.registry import family_rows, match
from megatron_dypo.models.families.table import Row
from megatron_dypo.models.stacked_experts import stored_tensors
from megatron_dypo.parallel.position import Position


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
    arch = architecture_from_hf(hf_config, where=str(path))
    weights = dict(stored_tensors(random_weights(arch, seed).items(), arch))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokens = {name: value for name, value in hf_config.items() if name.endswith("_token_id")}
    for file, content in ((folder / "generation_config.json", tokens), (path, hf_config)):
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return sum(weight.numel() for weight in weights.values())


@torch.no_grad()
def fill_random(
    named_params: Iterable[tuple[str, torch.Tensor]], arch: Architecture, position: Position, seed: int
) -> None:
    """Fill each parameter of the rank at ``position`` in place, with the deviations of :func:`random_weights`.

    Ranks that hold the same part of a parameter draw the same values, also of a tied embedding on two stages. Another
    layout, and another kind of device, draws others.
    """
    for name, parameter in named_params:
        row = match(name, arch)
        rank, size = position.shard(is_expert=row.is_expert)
        is_shared = row.rule.mcore_shape(arch, size) == row.rule.mcore_shape(arch, 1)
        if parameter.dim() == 1:
            parameter.fill_(0.0 if _is_bias(row.hf[0]) else 1.0)
            continue
        key = f"{seed} {' '.join(row.hf)} {0 if is_shared else rank}"
        generator = torch.Generator(device=parameter.device)
        generator.manual_seed(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big"))
        parameter.normal_(0.0, _deviation(row, arch), generator=generator)


def _is_bias(hf_name: str) -> bool:
    return hf_name.rpartition(".")[2] in ("bias", "e_score_correction_bias", "sinks")


def _deviation(row: Row, arch: Architecture) -> float:
    """Return the standard deviation of a matrix; see :func:`random_weights`."""
    is_lookup = row.mcore.startswith("embedding.") and not arch.tied_embeddings
    return 1.0 if is_lookup else 1 / math.sqrt(row.rule.hf_shapes(arch)[0][1])


def random_weights(arch: Architecture, seed: int) -> dict[str, torch.Tensor]:
    """Return random weights: HF name of the name table → fp32 tensor.

    Matrices are normal with standard deviation 1/√fan-in. The embedding has standard deviation 1, or 1/√hidden if it is
    also the output layer. Norms are one, biases and sinks zero. Small models learn much faster from this than from the
    usual 0.02.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for row in family_rows(arch):
        if row.is_copy:
            continue
        for name, shape in zip(row.hf, row.rule.hf_shapes(arch), strict=True):
            if len(shape) == 1:
                weights[name] = torch.zeros(shape) if _is_bias(name) else torch.ones(shape)
            else:
                weights[name] = torch.randn(shape, generator=generator) * _deviation(row, arch)
    return weights
