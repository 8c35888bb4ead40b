"""Train a small tokenizer, byte-level BPE or sentencepiece, and write its files to an HF model folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

PAD, BEGIN, END = SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def train_bpe(texts: Sequence[str], folder: Path, vocabulary_size: int) -> None:
    """Write ``tokenizer.json``: byte-level BPE of the tokenizers library, every digit a token of its own."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_config(folder, "PreTrainedTokenizerFast", stale="tokenizer.model")


def train_sentencepiece(texts: Sequence[str], folder: Path, vocabulary_size: int) -> None:
    """Write ``tokenizer.model``: a sentencepiece BPE with byte fallback, every digit a piece of its own."""
    with (folder / "tokenizer.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocabulary_size,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            byte_fallback=True,
            split_digits=True,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            user_defined_symbols=["\n"],
            max_sentence_length=1 << 16,
            minloglevel=2,
        )
    _write_config(folder, "LlamaTokenizer", stale="tokenizer.json")


TRAINERS: Mapping[str, Callable[[Sequence[str], Path, int], None]] = {
    "bpe": train_bpe,
    "sentencepiece": train_sentencepiece,
}


def _write_config(folder: Path, tokenizer_class: str, stale: str) -> None:
    """Write ``tokenizer_config.json``; remove ``stale``, the other kind's file, if an earlier call left it."""
    (folder / stale).unlink(missing_ok=True)
    config = {
        "tokenizer_class": tokenizer_class,
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "add_bos_token": True,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
