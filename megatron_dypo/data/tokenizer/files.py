"""The JSON files of a tokenizer's folder: special tokens, chat template, stop ids."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
"""The files of a tokenizer in an HF model folder."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True, kw_only=True)
class TokenizerFolder:
    """The settings in the files beside a tokenizer."""

    path: Path
    special_tokens: dict[str, str]
    """``bos_token``, ``eos_token``, ``pad_token``, … → their text."""
    add_bos: bool | None
    """``add_bos_token`` of tokenizer_config.json; None if it is missing."""
    legacy: bool
    """``legacy`` of tokenizer_config.json: whether sentencepiece also puts a space before text after a special
    token."""
    stop_ids: Mapping[int, str]
    """``eos_token_id`` of generation_config.json, then of config.json → the file that names it."""
    chat_template: str | None
    """The template's text, not compiled."""
    template_place: str
    """The file that holds the chat template."""
    added_tokens: dict[str, int]
    """Tokens that HF adds beside the vocabulary (added_tokens.json, ``added_tokens_decoder``)."""

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
    for name in ("add_bos_token", "legacy"):
        if not isinstance(config.get(name, False), bool | None):
            raise ValueError(f"{config_path}: {name}={_short(config[name])}: must be true or false")
    older = path / "special_tokens_map.json"
    template, place = _chat_template(path, config, config_path)
    stop_ids: dict[int, str] = {}
    for name in ("generation_config.json", "config.json"):
        for token_id in _stop_ids(path / name):
            stop_ids.setdefault(token_id, name)
    return TokenizerFolder(
        path=path,
        special_tokens=_special_tokens(read_json(older), older) | _special_tokens(config, config_path),
        add_bos=config.get("add_bos_token"),
        legacy=bool(config.get("legacy")),
        stop_ids=stop_ids,
        chat_template=template,
        template_place=place,
        added_tokens=_added_tokens(path, config, config_path),
    )


def read_bytes(path: Path) -> bytes | None:
    """Return the content of a file, or None if nothing has that name.

    Raises ValueError for a folder, a broken link and a git-lfs pointer, which do not count as missing.
    """
    if not os.path.lexists(path):
        return None
    if not path.is_file():
        raise ValueError(f"{path}: is not a file" + (": a link to nothing" if not path.exists() else ""))
    content = path.read_bytes()
    if content.startswith(_LFS_POINTER):
        raise ValueError(f"{path}: is a git-lfs pointer: run `git lfs pull` in its folder")
    return content


def read_text(path: Path) -> str | None:
    """Return the text of a UTF-8 file, or None if there is none. Raises ValueError like :func:`read_bytes`, and for bad
    UTF-8."""
    content = read_bytes(path)
    try:
        return None if content is None else content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8: {error.reason} at byte {error.start}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or {} if there is no file.

    Raises ValueError naming the file if it holds something else, or an object with a key twice.
    """
    text = read_text(path)
    if text is None:
        return {}
    try:
        content = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a JSON object, holds a {type(content).__name__}")
    if _SURROGATE.search(text):
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{path}: holds a lone surrogate, {error.object[error.start]!r}: is no Unicode") from error
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return content


def _special_tokens(config: dict[str, Any], place: Path) -> dict[str, str]:
    tokens = {}
    for name, value in config.items():
        if not name.endswith("_token") or value is None or isinstance(value, bool):
            continue
        text = value.get("content") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise ValueError(f"{place}: {name}={_short(value)}: must be a string or an object with a string `content`")
        tokens[name] = text
    return tokens


def _stop_ids(path: Path) -> list[int]:
    value = read_json(path).get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token_id in ids:
        if not _is_token_id(token_id):
            raise ValueError(f"{path}: eos_token_id={_short(value)}: must be a token id or a list of token ids")
    return ids


def _added_tokens(path: Path, config: dict[str, Any], config_path: Path) -> dict[str, int]:
    older = path / "added_tokens.json"
    added = read_json(older)
    for text, token_id in added.items():
        if not _is_token_id(token_id):
            raise ValueError(f"{older}: {text}={_short(token_id)}: must be a token id")
    declared = config.get("added_tokens_decoder")
    if declared is None:
        return added
    rule = "must be an object: a token id → an object with a string `content`"
    if not isinstance(declared, dict):
        raise ValueError(f"{config_path}: added_tokens_decoder={_short(declared)}: {rule}")
    for key, entry in declared.items():
        content = entry.get("content") if isinstance(entry, dict) else None
        if not (key.isascii() and key.isdecimal() and len(key) < 10) or not isinstance(content, str):
            raise ValueError(f"{config_path}: added_tokens_decoder.{key}={_short(entry)}: {rule}")
        added[content] = int(key)
    return added


def _chat_template(path: Path, config: dict[str, Any], config_path: Path) -> tuple[str | None, str]:
    file = path / "chat_template.jinja"
    text = read_text(file)
    if text is not None:
        return text, str(file)
    template = config.get("chat_template")
    if isinstance(template, list):
        template = _default_template(template, config_path)
    if template is not None and not isinstance(template, str):
        raise ValueError(
            f"{config_path}: chat_template={_short(template)}: must be a string or a list of named templates"
        )
    return template, str(config_path)


def _default_template(templates: list[Any], place: Path) -> str:
    named = {}
    for entry in templates:
        name, text = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(
                f"{place}: chat_template={_short(templates)}: each entry of a list must be an object "
                "with a string `name` and a string `template`"
            )
        named[name] = text
    if "default" not in named:
        raise ValueError(f"{place}: chat_template names {sorted(named)}: one of them must be named `default`")
    return named["default"]


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
