"""The two kinds of tokenizer files: ``tokenizer.json`` of the `tokenizers` library, and sentencepiece models."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from megatron_dypo.data.tokenizer.files import read_bytes, read_json
from megatron_dypo.data.tokenizer.folder import FolderTokenizer, TokenizerOptions


class HFTokenizer(FolderTokenizer):
    """A ``tokenizer.json`` of the `tokenizers` library, with the configuration files beside it."""

    def __init__(self, file: Path, options: TokenizerOptions) -> None:
        self._tokenizer = _load_json(file)
        self._name = str(file)
        super().__init__(file, max(self._tokenizer.get_vocab().values(), default=-1) + 1, options)
        self._require_added_tokens()
        bos_id = self._special_id("bos_token")
        add_bos = self._folder.add_bos
        if add_bos is None:
            # Llama 3 and others configure it in the post-processor of tokenizer.json.
            with _named_panics(self._name):
                processed = self._tokenizer.encode("", add_special_tokens=True).ids
            add_bos = bos_id is not None and processed[:1] == [bos_id]
        self._finish(self._special_id("eos_token"), bos_id, add_bos, self._special())

    def _special(self) -> set[int]:
        # Chat markers are often added as ordinary tokens. Added white space (Gemma) is no marker.
        added = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.content.strip()}
        named = {self._token_id(text) for text in self._folder.special_tokens.values()}
        return added | {token_id for token_id in named if token_id is not None}

    def _token_id(self, text: str) -> int | None:
        return self._tokenizer.token_to_id(text)

    def _token_text(self, token_id: int) -> str | None:
        return self._tokenizer.id_to_token(token_id) if token_id < self.vocab_size else None

    def _encode(self, text: str) -> list[int]:
        with _named_panics(self._name):
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        with _named_panics(self._name):
            return self._tokenizer.decode([int(token_id) for token_id in ids], skip_special_tokens=True)

    def show(self, ids: Sequence[int]) -> str:
        with _named_panics(self._name):
            return self._tokenizer.decode([int(token_id) for token_id in ids], skip_special_tokens=False)


@contextlib.contextmanager
def _named_panics(file: str) -> Iterator[None]:
    """Raise ValueError for a panic of the Rust library, whose class is no Exception and has no public name."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{file}: the tokenizers library cannot run this tokenizer: {error}") from error


def _load_json(file: Path) -> tokenizers.Tokenizer:
    content = read_json(file)
    if not isinstance(content.get("model"), dict):
        raise ValueError(f"{file}: has no object `model`: is not a file of the tokenizers library")
    try:
        with _named_panics(str(file)):
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except ValueError:
        raise
    except Exception as error:
        # The library raises a plain Exception for every fault of a file.
        raise ValueError(f"{file}: is not a tokenizer of tokenizers {tokenizers.__version__}: {error}") from error
    # If the ids of the file have gaps, the library renumbers added tokens.
    for token in content.get("added_tokens") or []:
        text, declared = token["content"], token["id"]
        if tokenizer.token_to_id(text) != declared:
            raise ValueError(
                f"{file}: added_tokens: {text!r} has id {declared}, but is loaded as {tokenizer.token_to_id(text)}: "
                "ids must follow those of the vocabulary without a hole"
            )
    # A tokenizer.json may truncate or pad, but prompts and traces must stay whole.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
"""``normalizer_spec { add_dummy_prefix: false }``. Appended to a model file, protobuf merges it into the model."""


class SentencePieceTokenizer(FolderTokenizer):
    """A sentencepiece ``.model``, with or without the HF configuration files beside it.

    Sentencepiece puts a space before a text. Here that happens only once for the whole text, and not after each special
    token in it, unless tokenizer_config.json has ``legacy: true`` (Mistral 7B). If the model has a BOS piece, plain
    prompts begin with it (as for Llama, Mistral and Gemma), unless tokenizer_config.json has ``add_bos_token: false``.
    """

    def __init__(self, file: Path, options: TokenizerOptions) -> None:
        self._processor, self._continued = _load_model(file)
        processor = self._processor
        super().__init__(file, processor.vocab_size(), options)
        self._require_added_tokens()
        self._control = {processor.id_to_piece(i): i for i in range(processor.vocab_size()) if processor.is_control(i)}
        # <unk> is no control piece, but HF finds it in a text if tokenizer_config.json names it.
        named = [(text, self._token_id(text)) for text in self._folder.special_tokens.values()]
        self._control |= {text: token_id for text, token_id in named if token_id is not None}
        # The longest first, so that a piece cannot hide a longer one with the same beginning.
        pieces = sorted(self._control, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, pieces)) + ")" if pieces else r"(?!)")
        eos_id, bos_id = self._special_id("eos_token"), self._special_id("bos_token")
        eos_id = processor.eos_id() if eos_id is None and processor.eos_id() >= 0 else eos_id
        bos_id = processor.bos_id() if bos_id is None and processor.bos_id() >= 0 else bos_id
        add_bos = bos_id is not None if self._folder.add_bos is None else self._folder.add_bos
        # Chat markers are often user-defined pieces, which sentencepiece itself would decode as text.
        self._unseen: set[Any] = {self._special_id(name) for name in self._folder.special_tokens} | {eos_id, bos_id}
        special = set(self._control.values()) | set(self._folder.added_tokens.values()) | (self._unseen - {None})
        self._finish(eos_id, bos_id, add_bos, special)

    def _token_id(self, text: str) -> int | None:
        token_id = self._processor.piece_to_id(text)
        return token_id if self._processor.id_to_piece(token_id) == text else None

    def _token_text(self, token_id: int) -> str | None:
        return self._processor.id_to_piece(token_id) if token_id < self.vocab_size else None

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._split.split(text):
            if part in self._control:
                ids.append(self._control[part])
            elif part:
                goes_on = ids and (part.startswith(" ") or not self._folder.legacy)
                ids.extend((self._continued if goes_on else self._processor).encode(part))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        # A model with a padded embedding may sample ids beyond the vocabulary, which have no text.
        text: str = self._processor.decode([int(i) for i in ids if i < self.vocab_size and int(i) not in self._unseen])
        return text

    def show(self, ids: Sequence[int]) -> str:
        hidden = self._unseen | set(self._control.values())
        text = ""
        for is_hidden, part in itertools.groupby([int(i) for i in ids if i < self.vocab_size], hidden.__contains__):
            if is_hidden:
                text += "".join(self._processor.id_to_piece(i) for i in part)
            else:
                processor = self._processor if not text or self._folder.legacy else self._continued
                text += processor.decode(list(part))
        return text


def _load_model(
    file: Path,
) -> tuple[sentencepiece.SentencePieceProcessor, sentencepiece.SentencePieceProcessor]:
    """Return the processor of a model file, and one for continued text, which adds no space before a text."""
    model = read_bytes(file)
    if model is None:
        raise ValueError(f"{file}: no such file")
    try:
        return (
            sentencepiece.SentencePieceProcessor(model_proto=model),
            sentencepiece.SentencePieceProcessor(model_proto=model + _NO_DUMMY_PREFIX),
        )
    except RuntimeError as error:
        raise ValueError(f"{file}: is not a sentencepiece model: {error}") from error
