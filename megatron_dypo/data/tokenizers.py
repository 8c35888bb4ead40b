"""Tokenizers behind one small interface: HF ``tokenizer.json`` folders and sentencepiece ``.model`` files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

from megatron_dypo.data.chat import Message
from megatron_dypo.data.tokenizer_files import TokenizerFolder, read_folder, read_json


class Tokenizer(Protocol):
    """Text to token ids and back."""

    eos_id: int
    """The token that ends a turn, and so a teacher's trace: ``eos_token`` of tokenizer_config.json."""
    eos_ids: tuple[int, ...]
    """Every id that stops generation: ``eos_id`` first, then those of generation_config.json and config.json."""
    vocab_size: int
    """One more than the largest id."""

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` with no BOS or EOS added; special tokens written in the text become their ids."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; special tokens are left out."""

    def render(self, messages: Sequence[Message] | str, use_chat_template: bool) -> list[int]:
        """Ids of a prompt: chat template with the header of the answer, or plain text with BOS if configured.

        A string is one user message when the tokenizer has a template and ``use_chat_template`` is set, else plain
        text. Raises ValueError for messages without a template to render them.
        """

    def save(self, folder: Path) -> None:
        """Copy the tokenizer's own files into ``folder``."""


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Load the tokenizer of an HF model folder, or a ``tokenizer.json`` or ``.model`` file.

    A folder with both ``tokenizer.json`` and ``tokenizer.model`` is read by the former. Raises ValueError when there
    is none, or when its files contradict each other.
    """
    path = Path(path)
    if path.is_dir():
        candidates = [path / "tokenizer.json", path / "tokenizer.model"]
        file = next((candidate for candidate in candidates if candidate.is_file()), None)
        if file is None:
            raise ValueError(f"{path}: has no tokenizer.json and no tokenizer.model")
    elif path.is_file():
        file = path
    else:
        raise ValueError(f"{path}: no such file or folder")
    if file.suffix == ".json":
        return HFTokenizer(file)
    if file.suffix == ".model":
        return SentencePieceTokenizer(file)
    raise ValueError(f"{file}: a tokenizer file must end in .json or .model")


class _FolderTokenizer:
    """What both kinds share: special tokens, prompts, saving."""

    def __init__(self, file: Path, vocab_size: int) -> None:
        self._file = file
        self._folder: TokenizerFolder = read_folder(file.parent)
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def _token_id(self, text: str) -> int | None:
        raise NotImplementedError

    def _special_id(self, name: str) -> int | None:
        text = self._folder.special_tokens.get(name)
        if text is None:
            return None
        token_id = self._token_id(text)
        if token_id is None:
            place = self._folder.path / "tokenizer_config.json"
            raise ValueError(f"{place}: {name}={text!r}: is not in the vocabulary of {self._file.name}")
        return token_id

    def _set_special_ids(self, eos_id: int | None, bos_id: int | None, add_bos: bool) -> None:
        stop_ids = self._folder.stop_ids
        too_large = [token_id for token_id in stop_ids if token_id >= self.vocab_size]
        if too_large:
            raise ValueError(f"{self._folder.path}: eos_token_id={too_large}: the vocabulary has {self.vocab_size} ids")
        if eos_id is None:
            eos_id = stop_ids[0] if stop_ids else None
        if eos_id is None:
            raise ValueError(
                f"{self._folder.path}: neither eos_token (tokenizer_config.json) nor eos_token_id is given"
            )
        self.eos_id = eos_id
        self.eos_ids = tuple(dict.fromkeys((eos_id, *stop_ids)))
        if add_bos and bos_id is None:
            place = self._folder.path / "tokenizer_config.json"
            raise ValueError(f"{place}: add_bos_token=true: needs a bos_token")
        self._prompt_prefix = [bos_id] if add_bos and bos_id is not None else []

    def render(self, messages: Sequence[Message] | str, use_chat_template: bool) -> list[int]:
        template = self._folder.chat_template
        if isinstance(messages, str):
            if not use_chat_template or template is None:
                return self._prompt_prefix + self.encode(messages)
            messages = [{"role": "user", "content": messages}]
        if not use_chat_template:
            raise ValueError("prompt: is a list of chat messages, which chat_template=false cannot render")
        if template is None:
            raise ValueError(f"prompt: is a list of chat messages, but the tokenizer {self._file} has no chat template")
        return self.encode(template.render(messages))

    def save(self, folder: Path) -> None:
        self._folder.copy_to(folder, extra=(self._file,))

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        # Another process loads it anew: compiled templates cannot be sent.
        return load_tokenizer, (self._file,)


class HFTokenizer(_FolderTokenizer):
    """A ``tokenizer.json`` of the `tokenizers` library, with the configuration files beside it."""

    def __init__(self, file: Path) -> None:
        if "model" not in read_json(file):
            raise ValueError(f"{file}: has no field `model`: is not a file of the tokenizers library")
        self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        # A tokenizer.json may cut or pad; prompts and traces must come out whole.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        super().__init__(file, vocab_size=max(self._tokenizer.get_vocab().values(), default=-1) + 1)
        bos_id = self._special_id("bos_token")
        add_bos = self._folder.add_bos
        if add_bos is None:
            # Llama 3 and others say it in the post-processor of tokenizer.json instead.
            processed = self._tokenizer.encode("", add_special_tokens=True).ids
            add_bos = bos_id is not None and processed[:1] == [bos_id]
        self._set_special_ids(self._special_id("eos_token"), bos_id, add_bos)

    def _token_id(self, text: str) -> int | None:
        return self._tokenizer.token_to_id(text)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(token_id) for token_id in ids], skip_special_tokens=True)


_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
"""``normalizer_spec { add_dummy_prefix: false }``: protobuf merges a message that follows into the one before."""


class SentencePieceTokenizer(_FolderTokenizer):
    """A sentencepiece ``.model``, with or without the HF configuration files beside it.

    The space that sentencepiece puts before a text is put before the whole text only, not again after each special
    token in it (HF's ``legacy: false``). A model with a BOS piece starts plain prompts with it, as those of Llama,
    Mistral and Gemma do, unless tokenizer_config.json says ``add_bos_token: false``.
    """

    def __init__(self, file: Path) -> None:
        model = file.read_bytes()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self._continued = sentencepiece.SentencePieceProcessor(model_proto=model + _NO_DUMMY_PREFIX)
        except RuntimeError as error:
            raise ValueError(f"{file}: is not a sentencepiece model: {error}") from error
        processor = self._processor
        super().__init__(file, vocab_size=processor.vocab_size())
        self._folder.require_inside(self.vocab_size, file)
        self._control = {processor.id_to_piece(i): i for i in range(processor.vocab_size()) if processor.is_control(i)}
        # The longest first, so that no control piece hides another that it begins.
        pieces = sorted(self._control, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, pieces)) + ")" if pieces else r"(?!)")
        eos_id, bos_id = self._special_id("eos_token"), self._special_id("bos_token")
        eos_id = processor.eos_id() if eos_id is None and processor.eos_id() >= 0 else eos_id
        bos_id = processor.bos_id() if bos_id is None and processor.bos_id() >= 0 else bos_id
        add_bos = bos_id is not None if self._folder.add_bos is None else self._folder.add_bos
        self._set_special_ids(eos_id, bos_id, add_bos)
        # Chat markers are often user-defined pieces, which sentencepiece itself would decode as text.
        self._unseen = {self._special_id(name) for name in self._folder.special_tokens} | {eos_id, bos_id}

    def _token_id(self, text: str) -> int | None:
        token_id = self._processor.piece_to_id(text)
        return token_id if self._processor.id_to_piece(token_id) == text else None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._split.split(text):
            if part in self._control:
                ids.append(self._control[part])
            elif part:
                ids.extend((self._continued if ids else self._processor).encode(part))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        # A model whose embedding is padded may sample ids past the vocabulary: they have no text.
        return self._processor.decode([int(i) for i in ids if i < self.vocab_size and int(i) not in self._unseen])
