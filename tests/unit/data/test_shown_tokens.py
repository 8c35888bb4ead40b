"""Token ids shown to people: with special tokens, and the text unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dypo.data.tokenizer.open import load_tokenizer


@pytest.mark.parametrize("text", ["plain", " two  spaces ", "<|im_start|>user\nnaïve 十<|im_end|>\n"])
def test_shown_ids_of_a_byte_level_tokenizer_are_the_text(bpe_folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(bpe_folder)
    assert tokenizer.show(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", ["plain", "two  spaces", "<s>[INST] What is 1? [/INST] It is 2.</s>", "<turn>a"])
def test_shown_ids_of_a_sentencepiece_model_are_the_text(sentencepiece_folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(sentencepiece_folder)
    assert tokenizer.show(tokenizer.encode(text)) == text


def test_decoded_ids_are_without_special_tokens(sentencepiece_folder: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_folder)
    assert tokenizer.decode(tokenizer.encode("<s>a</s>")) == "a"
