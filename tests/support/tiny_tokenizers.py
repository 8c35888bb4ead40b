"""Train tiny tokenizers for tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

TEMPLATE = """{{ bos_token }}{% for message in messages %}
{% if message['role'] not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role ' + message['role']) }}
{% endif %}
<|im_start|>{{ message['role'] }}
{{ message['content'] | trim }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


CORPUS = [f"What is {a} + {b}? The answer is {a + b}. Let us think: 十 naïve\n" for a in range(30) for b in range(30)]


SPECIAL = ("<|bos|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")


def train_bpe(folder: Path, **config: object) -> Path:
    """Write an HF tokenizer folder: byte-level BPE of 400 tokens and tokenizer_config.json with ``config``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|im_end|>",
        "chat_template": TEMPLATE,
        **config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def train_sentencepiece(folder: Path, **config: object) -> Path:
    """Write ``tokenizer.model`` (300 pieces, <s> and </s>, a control piece [INST]) and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["[INST]", "[/INST]"],
        user_defined_symbols=["<turn>"],
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def variant(source: Path, target: Path, **changes: object) -> Path:
    """Copy a tokenizer folder and change keys of tokenizer_config.json; None removes a key."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    path = target / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return target
