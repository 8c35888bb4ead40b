"""Random damage to tokenizer files and templates: the tokenizer loads or raises ValueError; nothing else happens."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_dypo.data.tokenizer.open import load_tokenizer
from tests.support.chat_families import FAMILIES

CHAT = [{"role": "user", "content": "What is 1 + 2?"}]
JUNK: list[Any] = [
    None,
    True,
    -1,
    1 << 70,
    1e308,
    float("nan"),
    "",
    "\ud83d",
    "{{",
    [],
    {},
    [[]],
    {"content": 1},
    ["x"],
]


def _nodes(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Yield the paths of the values in a JSON tree; only those at both ends of a long list or object."""
    items = list(tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else [])
    if len(items) > 40:
        items = items[:3] + items[-3:]
    return [path] * bool(path) + [node for key, value in items for node in _nodes(value, (*path, key))]


def _damage_tree(file: Path, rng: random.Random) -> None:
    tree = json.loads(file.read_text())
    *way, last = rng.choice(_nodes(tree))
    parent = tree
    for key in way:
        parent = parent[key]
    if rng.random() < 0.3:
        del parent[last]
    else:
        parent[last] = rng.choice(JUNK)
    file.write_text(json.dumps(tree))


def _damage_bytes(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    at = rng.randrange(len(content))
    if rng.random() < 0.3:
        content = content[:at]
    else:
        content[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
    file.write_bytes(bytes(content))


def _try(folder: Path) -> None:
    with contextlib.suppress(ValueError):
        load_tokenizer(folder).render(CHAT, True)


def _run(source: Path, tmp_path: Path, seed: int, rounds: int, damages: list[tuple[str, Callable[..., None]]]) -> None:
    rng = random.Random(seed)
    for number in range(rounds):
        folder = tmp_path / str(number)
        shutil.copytree(source, folder)
        name, damage = rng.choice(damages)
        damage(folder / name, rng)
        _try(folder)
        shutil.rmtree(folder)


POST_PROCESSOR = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [0], "tokens": ["<|bos|>"]}},
}


def _write_extras(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = POST_PROCESSOR
    content["normalizer"] = {"type": "Replace", "pattern": {"Regex": "x{2,}"}, "content": "y"}
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    (folder / "added_tokens.json").write_text('{"<|bos|>": 0}')
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"0": {"content": "<|bos|>", "special": True}}
    config["chat_template"] = [{"name": "default", "template": config["chat_template"]}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
)
BPE = [(name, damage) for name in NAMES for damage in (_damage_tree, _damage_bytes)]


@pytest.mark.parametrize("rounds", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_damage_to_a_tokenizer_json_folder_is_named(bpe_folder: Path, tmp_path: Path, rounds: int) -> None:
    source = tmp_path / "source"
    shutil.copytree(bpe_folder, source)
    _write_extras(source)
    _run(source, tmp_path, seed=rounds, rounds=rounds, damages=BPE)


@pytest.mark.parametrize("rounds", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_damage_to_a_sentencepiece_folder_is_named(sentencepiece_folder: Path, tmp_path: Path, rounds: int) -> None:
    damages = [("tokenizer.model", _damage_bytes), ("tokenizer_config.json", _damage_tree)]
    _run(sentencepiece_folder, tmp_path, seed=rounds, rounds=rounds, damages=damages)


@pytest.mark.parametrize("rounds", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_damage_to_a_template_is_named(bpe_folder: Path, tmp_path: Path, rounds: int) -> None:
    rng = random.Random(rounds)
    folder = tmp_path / "t"
    shutil.copytree(bpe_folder, folder)
    for _ in range(rounds):
        template = rng.choice(list(FAMILIES.values())).template
        start = rng.randrange(len(template))
        text = (
            template[:start]
            + rng.choice(["", "{{", "%}", "'", "(", "range(99)", "1//0"])
            + template[start + rng.randrange(9) :]
        )
        (folder / "chat_template.jinja").write_text(text)
        _try(folder)
