"""A model of Megatron-Bridge on Transformer Engine's layers, on a CPU, in a process of ``tests.support.te.program``."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.te.models import joined


def load_bridged_model(path: str) -> dict[str, Any]:
    """Build and load the model of an HF folder; return its layers' classes, and how exported tensors differ."""
    from safetensors.torch import load_file

    from megatron_dypo.config.model import ModelConfig, ParallelConfig
    from megatron_dypo.mcore.bridged.weights import BridgedWeights
    from megatron_dypo.mcore.model import build_model, load_initial_weights
    from megatron_dypo.models.bridged import architecture_of

    layout, parallel = joined(), ParallelConfig()
    model = ModelConfig(hf_path=path, dtype="float32", family="bridge")
    arch = architecture_of(model)
    chunks = build_model(arch, model, parallel, layout)
    load_initial_weights(chunks, model, arch, layout)
    written, read = dict(BridgedWeights(path, chunks, layout).tensors()), load_file(f"{path}/model.safetensors")
    layer = chunks[0].module.decoder.layers[0]
    return {
        "classes": sorted({type(module).__name__ for module in layer.modules()}),
        "names": sorted(written.keys() ^ read.keys()),
        "different": [name for name, value in read.items() if not torch.equal(written[name], value)],
    }
