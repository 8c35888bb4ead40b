"""The quickstart's model: a Qwen3 of about a million random parameters with a tokenizer of single characters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from task import ANSWER_MARK
from tokenizers import decoders, models, pre_tokenizers

from megatron_dypo.models.random_model import write_random_model

PAD, END = "<pad>", "<end>"
VOCABULARY = (PAD, END, *"0123456789", "+", "=", ",", ANSWER_MARK)

HF_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": len(VOCABULARY),
    "pad_token_id": VOCABULARY.index(PAD),
    "eos_token_id": VOCABULARY.index(END),
    "torch_dtype": "float32",
}


def write_model(folder: Path, seed: int, tokens: Sequence[str] = VOCABULARY) -> int:
    """Write the HF model folder and return the number of parameters. ``tokens`` begins with PAD and END."""
    write_tokenizer(folder, tokens)
    return write_random_model(folder, {**HF_CONFIG, "vocab_size": len(tokens)}, seed)


def write_tokenizer(folder: Path, tokens: Sequence[str]) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``: a token for each character, one for the answer's mark."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(f"{ANSWER_MARK}|."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([PAD, END])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": PAD, "unk_token": PAD}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
