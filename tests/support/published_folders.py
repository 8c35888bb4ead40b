"""Write tokenizer folders of published models, from vocabularies in packages."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers.convert_slow_tokenizer import generate_merges

from tests.support.published_families import (
    ORDINARY,
    PUBLISHED,
    Published,
    added_tokens,
    read_pattern,
    read_ranks,
    read_template,
    sentencepiece_model,
)


def write_published(folder: Path, name: str) -> Path:
    """Write the folder of a published model: tokenizer, tokenizer_config.json, generation_config.json.

    Folders with the same parent share the files of a tokenizer that several models have.
    """
    model = PUBLISHED[name]
    folder.mkdir(parents=True)
    shared = folder.parent / f"tokenizer_of_{model.tokenizer}"
    if not shared.is_dir():
        shared.mkdir()
        _write_tokenizer(shared, model)
    for file in shared.iterdir():
        (folder / file.name).hardlink_to(file)
    config = {
        "tokenizer_class": model.tokenizer_class,
        "bos_token": model.bos_token,
        "eos_token": model.eos_token,
        "chat_template": read_template(model),
        "clean_up_tokenization_spaces": False,
        **model.settings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(model.stops)}))
    return folder


def merge_bytes(word: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    """Return the parts of a word: pairs whose rank is under ``below`` are merged, the lowest rank first."""
    parts = [bytes([byte]) for byte in word]
    while len(parts) > 1:
        found = [ranks.get(left + right, below) for left, right in itertools.pairwise(parts)]
        lowest = min(found)
        if lowest >= below:
            break
        at = found.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


@functools.cache
def _vocabulary(vocabulary: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return token → id, and the merges in order, for a byte-level BPE of the tokenizers library."""
    ranks = read_ranks(vocabulary)
    # GPT-2's alphabet: printable bytes are themselves, the others the characters from 256 on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    char = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    text = {token: "".join(char[byte] for byte in token) for token in ranks}
    pairs = (merge_bytes(token, ranks, rank) for token, rank in ranks.items() if len(token) > 1)
    # No merge leads to a few tokens of Llama 3: ignore_merges is for them.
    merges = [(text[pair[0]], text[pair[1]]) for pair in pairs if len(pair) == 2]
    return {text[token]: rank for token, rank in ranks.items()}, merges


def _write_tokenizer(folder: Path, model: Published) -> None:
    if model.is_sentencepiece:
        shutil.copyfile(sentencepiece_model(model), folder / "tokenizer.model")
        tokenizer = convert_sentencepiece(folder / "tokenizer.model")
    else:
        tokenizer = _from_ranks(model)
    if model.bos_token is not None:
        bos = (model.bos_token, tokenizer.token_to_id(model.bos_token))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{model.bos_token} $A", pair=f"{model.bos_token} $A {model.bos_token} $B", special_tokens=[bos]
        )
    tokenizer.save(str(folder / "tokenizer.json"))


def _from_ranks(model: Published) -> Tokenizer:
    vocabulary, merges = _vocabulary(model.vocabulary)
    is_llama = model.vocabulary == "llama3"
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=is_llama))
    if not is_llama:
        tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(read_pattern(model.vocabulary)), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [AddedToken(text, normalized=False, special=text not in ORDINARY) for text in added_tokens(model)]
    )
    return tokenizer


def convert_sentencepiece(file: Path) -> Tokenizer:
    """Return the tokenizer.json for a sentencepiece model, made as transformers 4 made the published ones."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = generate_merges(vocabulary, {piece: model.get_score(i) for piece, i in vocabulary.items()})
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    control = [piece for i, piece in enumerate(pieces) if i == model.unk_id() or model.is_control(i)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in control])
    return tokenizer
