"""Tokenizers behind one small interface: HF ``tokenizer.json`` folders and sentencepiece ``.model`` files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_dypo.data.tokenizer.chat import Message
from megatron_dypo.data.tokenizer.folder import TokenizerOptions
from megatron_dypo.data.tokenizer.kinds import HFTokenizer, SentencePieceTokenizer


class Tokenizer(Protocol):
    """Text to token ids and back."""

    eos_id: int
    """The token that ends a turn, and so a teacher's trace. With a chat template it is the first special token after an
    assistant's message (``<|im_end|>``), else ``eos_token`` of tokenizer_config.json."""
    eos_ids: tuple[int, ...]
    """Every id that stops generation: ``eos_id``, then ``eos_token``, the ids of generation_config.json and
    config.json, and ``rollout.stop_token_ids``."""
    vocab_size: int
    """One more than the largest id."""
    generation_suffix: str
    """Beginning of the answer that a rendered prompt already contains: ``<think>\\n`` if the template opens the
    thinking, else empty. In a trace that begins with it, it is not repeated
    (:func:`megatron_dypo.data.tokenising.end_trace`)."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text`` without adding BOS or EOS. Special tokens written in the text become their ids.

        Raises ValueError for a text that is not valid Unicode (a lone surrogate).
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids`` without special tokens."""

    def show(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids`` with special tokens, for people and for comparing texts."""

    def render(self, messages: Sequence[Message] | str, use_chat_template: bool) -> list[int]:
        """Return the ids of a prompt: the chat template with the header of the answer, or plain text, with BOS if
        configured.

        A string is one message of a user if the tokenizer has a template and ``use_chat_template`` is set, else plain
        text. A prompt begins with at most one BOS. Raises ValueError for messages without a template.
        """

    def save(self, folder: Path) -> None:
        """Copy the tokenizer's own files into ``folder``."""


def load_tokenizer(
    path: Path | str,
    *,
    chat_template: bool = True,
    chat_template_args: Mapping[str, Any] | None = None,
    stop_token_ids: Sequence[int] = (),
) -> Tokenizer:
    """Load the tokenizer of an HF model folder, or a ``tokenizer.json`` or ``.model`` file.

    In a folder with both ``tokenizer.json`` and ``tokenizer.model``, the former is read.

    Args:
        path: the folder or file.
        chat_template: prompts are rendered with the chat template, if there is one (``data.chat_template``).
        chat_template_args: more values for the template (``data.chat_template_args``).
        stop_token_ids: more ids that stop generation (``rollout.stop_token_ids``).

    Raises:
        ValueError: there is no tokenizer, a file is broken, or its files contradict each other or the arguments.
    """
    path = Path(path)
    if path.is_dir():
        candidates = [path / "tokenizer.json", path / "tokenizer.model"]
        # A broken link counts as a file: reading it reports the problem.
        file = next((candidate for candidate in candidates if candidate.is_symlink() or candidate.exists()), None)
        if file is None:
            raise ValueError(f"{path}: has no tokenizer.json and no tokenizer.model")
    elif path.is_file():
        file = path
    else:
        raise ValueError(f"{path}: no such file or folder")
    options = TokenizerOptions(
        chat_template=chat_template,
        chat_template_args=dict(chat_template_args or {}),
        stop_token_ids=tuple(stop_token_ids),
    )
    if file.suffix == ".json":
        return HFTokenizer(file, options)
    if file.suffix == ".model":
        return SentencePieceTokenizer(file, options)
    raise ValueError(f"{file}: a tokenizer file must end in .json or .model")


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, place: Path | str) -> None:
    """Raise ValueError if the tokenizer has ids at or above the embedding's ``vocab_size``.

    ``place`` names the file that gives ``vocab_size``. Fewer ids than rows are normal, since embeddings are padded.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{place}: vocab_size={vocab_size}: the tokenizer has ids up to {tokenizer.vocab_size - 1}: "
            "each id needs a row of the embedding"
        )
