"""The JSON files that lie beside a tokenizer: special tokens, chat template, stop ids."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dypo.data.chat import ChatTemplate

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
"""What makes up a tokenizer in an HF model folder."""


@dataclass(frozen=True, kw_only=True)
class TokenizerFolder:
    """What the files beside a tokenizer say."""

    path: Path
    special_tokens: dict[str, str]
    """``bos_token``, ``eos_token``, ``pad_token``, … → their text."""
    add_bos: bool | None
    """``add_bos_token`` of tokenizer_config.json; None where it says nothing."""
    stop_ids: tuple[int, ...]
    """``eos_token_id`` of generation_config.json, then of config.json."""
    chat_template: ChatTemplate | None
    added_tokens: dict[str, int]
    """Tokens that HF adds beside the vocabulary (added_tokens.json, ``added_tokens_decoder``)."""

    def require_inside(self, vocab_size: int, file: Path) -> None:
        """Raise ValueError if HF adds tokens that the vocabulary of ``file`` lacks (they would be read as text)."""
        outside = sorted(text for text, token_id in self.added_tokens.items() if token_id >= vocab_size)
        if outside:
            raise ValueError(
                f"{self.path}: added tokens {outside[:5]}: {file.name} has only {vocab_size} pieces; "
                "such a tokenizer needs a tokenizer.json (transformers' save_pretrained writes one)"
            )

    def copy_to(self, target: Path, extra: tuple[Path, ...] = ()) -> None:
        """Copy the tokenizer's files, and ``extra`` ones, into the folder ``target``."""
        target.mkdir(parents=True, exist_ok=True)
        named = [self.path / name for name in TOKENIZER_FILES]
        for file in {*named, *extra}:
            if file.is_file() and file.parent.resolve() != target.resolve():
                shutil.copyfile(file, target / file.name)


def read_folder(path: Path) -> TokenizerFolder:
    """Read the configuration beside a tokenizer; every file is optional.

    Raises ValueError naming file, field, value and rule.
    """
    config_path = path / "tokenizer_config.json"
    config = read_json(config_path)
    special_tokens = _special_tokens(config, config_path)
    add_bos = config.get("add_bos_token")
    if add_bos is not None and not isinstance(add_bos, bool):
        raise ValueError(f"{config_path}: add_bos_token={add_bos!r}: must be true or false")
    return TokenizerFolder(
        path=path,
        special_tokens=special_tokens,
        add_bos=add_bos,
        stop_ids=tuple(dict.fromkeys(_stop_ids(path / "generation_config.json") + _stop_ids(path / "config.json"))),
        chat_template=_chat_template(path, config, special_tokens),
        added_tokens=_added_tokens(path, config),
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if there is no file. Raises ValueError naming the file if it holds another thing."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a JSON object, holds a {type(content).__name__}")
    return content


def _special_tokens(config: dict[str, Any], place: Path) -> dict[str, str]:
    tokens = {}
    for name, value in config.items():
        if not name.endswith("_token") or value is None or isinstance(value, bool):
            continue
        text = value.get("content") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise ValueError(f"{place}: {name}={value!r}: must be a string or an object with a string `content`")
        tokens[name] = text
    return tokens


def _stop_ids(path: Path) -> tuple[int, ...]:
    value = read_json(path).get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token_id in ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise ValueError(f"{path}: eos_token_id={value!r}: must be a token id or a list of token ids")
    return tuple(ids)


def _added_tokens(path: Path, config: dict[str, Any]) -> dict[str, int]:
    declared = config.get("added_tokens_decoder") or {}
    return read_json(path / "added_tokens.json") | {entry["content"]: int(key) for key, entry in declared.items()}


def _chat_template(path: Path, config: dict[str, Any], special_tokens: dict[str, str]) -> ChatTemplate | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        return ChatTemplate(file.read_text(encoding="utf-8"), special_tokens, str(file))
    place = path / "tokenizer_config.json"
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        if "default" not in named:
            raise ValueError(f"{place}: chat_template names {sorted(named)}: one of them must be named `default`")
        template = named["default"]
    if template is None:
        return None
    if not isinstance(template, str):
        raise ValueError(f"{place}: chat_template is a {type(template).__name__}: must be a string or a list")
    return ChatTemplate(template, special_tokens, str(place))
