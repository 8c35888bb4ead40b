"""The common part of both kinds of tokenizers: special tokens, the end of a turn, prompts, saving."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dypo.data.tokenizer.chat import ChatTemplate, Message, Turns
from megatron_dypo.data.tokenizer.files import TokenizerFolder, read_folder

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """The configuration's settings for the tokenizer; see :func:`megatron_dypo.data.tokenizer.open.load_tokenizer`."""

    chat_template: bool
    chat_template_args: Mapping[str, Any]
    stop_token_ids: tuple[int, ...]


class FolderTokenizer(ABC):
    """A tokenizer file with its configuration files. A subclass reads the file and then calls :meth:`_finish`."""

    def __init__(self, file: Path, vocab_size: int, options: TokenizerOptions) -> None:
        self._file, self._options = file, options
        self._folder: TokenizerFolder = read_folder(file.parent)
        self._config_path = self._folder.path / "tokenizer_config.json"
        self.vocab_size = vocab_size
        self._template = self._chat_template()

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Return the ids of a text that is valid Unicode."""

    @abstractmethod
    def _token_id(self, text: str) -> int | None:
        """Return the id of one token."""

    @abstractmethod
    def _token_text(self, token_id: int) -> str | None:
        """Return the text of one token; None if the vocabulary has no such id."""

    def encode(self, text: str) -> list[int]:
        try:
            return self._encode(text)
        except (TypeError, UnicodeEncodeError) as error:
            surrogate = next((i for i, char in enumerate(text) if 0xD800 <= ord(char) < 0xE000), None)
            if surrogate is None:
                raise
            raise ValueError(f"{text[:80]!r}: has a lone surrogate at character {surrogate}: is no Unicode") from error

    def render(self, messages: Sequence[Message] | str, use_chat_template: bool) -> list[int]:
        if use_chat_template and not self._options.chat_template:
            raise ValueError("is to be rendered by a chat template, but the tokenizer was loaded without")
        if isinstance(messages, str):
            if not use_chat_template or self._template is None:
                ids = self.encode(messages)
                return ids if ids[:1] == self._prompt_prefix else self._prompt_prefix + ids
            messages = [{"role": "user", "content": messages}]
        if not use_chat_template:
            raise ValueError("is a list of chat messages, which chat_template=false cannot render")
        if self._template is None:
            raise ValueError(f"is a list of chat messages, but the tokenizer {self._file} has no chat template")
        ids = self.encode(self._template.render(messages))
        # The template writes BOS; the text of the first message may also begin with it.
        while len(ids) > 1 and ids[0] == ids[1] == self._bos_id:
            ids = ids[1:]
        return ids

    def __reduce__(self) -> tuple[object, ...]:
        # Another process loads the file again, since the objects of the libraries cannot be sent.
        return type(self), (self._file, self._options)

    def save(self, folder: Path) -> None:
        self._folder.copy_to(folder, extra=(self._file,))

    def _chat_template(self) -> ChatTemplate | None:
        arguments, text = self._options.chat_template_args, self._folder.chat_template
        if self._options.chat_template and text is not None:
            return ChatTemplate(text, self._folder.special_tokens, self._folder.template_place, arguments)
        if arguments:
            why = f"{self._folder.path} has none" if self._options.chat_template else "data.chat_template is false"
            raise ValueError(f"data.chat_template_args={dict(arguments)}: needs a chat template: {why}")
        return None

    def _special_id(self, name: str) -> int | None:
        text = self._folder.special_tokens.get(name)
        if text is None:
            return None
        token_id = self._token_id(text)
        if token_id is None:
            raise ValueError(f"{self._config_path}: {name}={text!r}: is not in the vocabulary of {self._file.name}")
        return token_id

    def _finish(self, eos_token: int | None, bos_id: int | None, add_bos: bool, special: set[int]) -> None:
        """Set the beginning and end of prompts and traces; ``special`` are the ids that may end a turn."""
        stop_ids = self._stop_ids()
        turns = Turns() if self._template is None else self._template.turns()
        turn_end = self._turn_end(turns.end, special)
        ends = [token_id for token_id in (turn_end, eos_token, *stop_ids) if token_id is not None]
        if not ends:
            raise ValueError(
                f"{self._folder.path}: neither eos_token (tokenizer_config.json) nor eos_token_id is given"
            )
        self.eos_id = ends[0]
        self.eos_ids = tuple(dict.fromkeys((*ends, *self._options.stop_token_ids)))
        self.generation_suffix = turns.generation_suffix
        if add_bos and bos_id is None:
            raise ValueError(f"{self._config_path}: add_bos_token=true: needs a bos_token")
        self._bos_id = bos_id
        self._prompt_prefix = [bos_id] if add_bos and bos_id is not None else []

    def _stop_ids(self) -> list[int]:
        for token_id, name in self._folder.stop_ids.items():
            if token_id >= self.vocab_size:
                raise ValueError(
                    f"{self._folder.path / name}: eos_token_id={token_id}: the vocabulary of {self._file.name} "
                    f"has {self.vocab_size} ids"
                )
        for token_id in self._options.stop_token_ids:
            if token_id < 0 or self._token_text(token_id) is None:
                raise ValueError(
                    f"rollout.stop_token_ids={list(self._options.stop_token_ids)}: {token_id} is not in the vocabulary "
                    f"of {self._file}, which has ids up to {self.vocab_size - 1}"
                )
        return list(self._folder.stop_ids)

    def _turn_end(self, text: str, special: set[int]) -> int | None:
        """Return the first special token that the chat template writes after an assistant's message."""
        found = next((token_id for token_id in self.encode(text) if token_id in special), None) if text else None
        if found is None and text.strip():
            log.warning(
                "%s: the chat template ends a turn with %r, which has no special token: eos_token ends turns",
                self._folder.template_place,
                text,
            )
        return found

    def _require_added_tokens(self) -> None:
        """Raise ValueError if the vocabulary lacks a token that HF adds (it would be text), or gives it another id."""
        for text, token_id in self._folder.added_tokens.items():
            if self._token_id(text) is None:
                raise ValueError(
                    f"{self._folder.path}: added token {text!r} with id {token_id}: {self._file.name} has only "
                    f"{self.vocab_size} tokens, without this one; transformers' save_pretrained writes a "
                    "tokenizer.json that has it"
                )
            if self._token_id(text) != token_id:
                raise ValueError(
                    f"{self._folder.path}: added token {text!r} with id {token_id}: "
                    f"has id {self._token_id(text)} in {self._file.name}"
                )
