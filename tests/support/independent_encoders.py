"""Encoders of published tokenizers that share no code with the package: naive byte-pair merging, and sentencepiece."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable

import regex
import sentencepiece

from tests.support.published_families import Published, added_tokens, read_pattern, read_ranks, sentencepiece_model
from tests.support.published_folders import merge_bytes

Encode = Callable[[str, bool], list[int]]
"""(Text between special tokens, whether nothing is before it) → ids."""


def by_byte_pairs(model: Published) -> tuple[dict[str, int], Encode]:
    """Return special tokens and an encoder as tiktoken defines it.

    A text is cut into words; in each, the pair of the lowest rank merges, repeatedly.
    """
    first = len(read_ranks(model.vocabulary))
    pattern = regex.compile(read_pattern(model.vocabulary))

    def encode(part: str, _is_first: bool) -> list[int]:
        normal = unicodedata.normalize("NFC", part) if model.vocabulary == "qwen" else part
        words = [_word_ids(model.vocabulary, word.encode()) for word in pattern.findall(normal)]
        return [token_id for ids in words for token_id in ids]

    return {text: first + index for index, text in enumerate(added_tokens(model))}, encode


@functools.cache
def _word_ids(vocabulary: str, word: bytes) -> tuple[int, ...]:
    ranks = read_ranks(vocabulary)
    return tuple(ranks[part] for part in ([word] if word in ranks else merge_bytes(word, ranks, len(ranks))))


def by_sentencepiece(model: Published) -> tuple[dict[str, int], Encode]:
    """Return the special tokens of a sentencepiece model and an encoder with the library itself."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model(model)))
    control = [i for i in range(processor.vocab_size()) if i == processor.unk_id() or processor.is_control(i)]

    def encode(part: str, is_first: bool) -> list[int]:
        # Only the beginning of a text gets a space before it: further on, that goes before a line break that is added.
        return processor.encode(part) if is_first else processor.encode("\n" + part)[2:]

    return {processor.id_to_piece(i): i for i in control}, encode
