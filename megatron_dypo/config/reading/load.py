"""Read YAML and ``section.key=value`` overrides into :class:`megatron_dypo.config.tree.Config`, and write it back."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from megatron_dypo.config.eval_command import EvalCommandConfig
from megatron_dypo.config.presets import with_preset
from megatron_dypo.config.reading.typed import read_typed, shortened
from megatron_dypo.config.reading.yaml_text import read_yaml
from megatron_dypo.config.tree import Config

T = TypeVar("T")

_GONE = {
    "rollout.servers.count": "did you mean rollout.servers.per_node (servers that one node runs)? The number "
    "of rollout nodes is rollout.servers.nodes",
    "eval.prompts": "did you mean eval.sets, a mapping from a set's name to {path: FILE}?",
}
"""Keys that no longer exist, each with the keys to use instead."""

_UNICODE_BREAKS = re.compile("[\x85\u2028\u2029]")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply overrides, and check every rule.

    Args:
        path: a YAML mapping with sections of :class:`Config`. Sections and keys may be missing.
        overrides: texts ``section.key=value``; the value is YAML (``[a, b]``, ``null``, ``1e-6``).

    Raises:
        ValueError: one line for each problem, with file or override, field, value and rule.
    """
    return parse_config(_read_tree(path, overrides), where=str(path), overrides=overrides)


def load_tree(kind: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read a tree of dataclasses of another kind, as :func:`load_config` reads a config."""
    return _parse(kind, _read_tree(path, overrides), where=str(path), overrides=overrides)


def _read_tree(path: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    path = Path(path)
    tree = read_yaml(_read_text(path), str(path))
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: must be a mapping of sections, got {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    return tree


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path}: no such config file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error


def parse_config(tree: Mapping[str, Any], *, where: str, overrides: Sequence[str] = ()) -> Config:
    """Read the config from a nested mapping.

    Args:
        where: names the mapping in errors.
        overrides: ``section.key=value`` texts that the mapping already contains; errors of these keys name them.
    """
    return _parse(Config, with_preset(tree), where=where, overrides=overrides)


def _parse(kind: type[T], tree: Mapping[str, Any], *, where: str, overrides: Sequence[str]) -> T:
    read, problems = read_typed(kind, tree, _GONE)
    if read is None:
        raise ValueError("\n".join(f"{_origin(problem, overrides) or where}: {problem}" for problem in problems))
    return read


def _origin(problem: str, overrides: Sequence[str]) -> str | None:
    """Return the override that set the key with which a problem begins; None if none did."""
    for override in reversed(overrides):
        key = override.partition("=")[0]
        if problem.startswith(key) and not re.match(r"\w", problem[len(key) :]):
            return f"override {shortened(override)!r}"
    return None


def dump_config(config: Config | EvalCommandConfig) -> str:
    """Return the resolved config as YAML, with every default, in the order of the dataclasses."""
    tree = _plain(dataclasses.asdict(config))
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    # PyYAML loses a line break of Unicode (U+0085, U+2028, U+2029) in a key that it does not escape.
    return yaml.safe_dump(tree, sort_keys=False) if _UNICODE_BREAKS.search(text) else text


def changed_lines(before: str, after: str) -> list[str]:
    """Return ``section.key: old → new`` for each value that differs between two dumped configs.

    A key that only one of them has (another version wrote that one) is shown as absent in the other.
    """
    old, new = (dict(_leaves(yaml.safe_load(text), "")) for text in (before, after))

    def text(values: dict[str, Any], key: str) -> str:
        return repr(values[key]) if key in values else "absent"

    lines = ((key, text(old, key), text(new, key)) for key in {**old, **new})
    return [f"{key}: {one} → {other}" for key, one, other in lines if one != other]


def override_lines(before: Config, after: Config) -> list[str]:
    """Return the overrides (``section.key=value``) that turn ``before`` into ``after``."""
    trees = [yaml.safe_load(dump_config(config)) for config in (before, after)]
    old, new = (dict(_leaves(tree, "")) for tree in trees)
    # A key of a free mapping such as data.chat_template_args may be new, or gone: then the mapping is written whole.
    whole = {mapping: value for key in old.keys() - new.keys() for mapping, value in [_mapping_without(trees[1], key)]}
    changed = {key: value for key, value in new.items() if key not in old or old[key] != value}
    kept = {key: value for key, value in changed.items() if not key.startswith(tuple(f"{name}." for name in whole))}
    return [f"{key}={flow_yaml(value)}" for key, value in {**dict(sorted(whole.items())), **kept}.items()]


def _mapping_without(tree: Any, key: str) -> tuple[str, Any]:
    """Return the innermost mapping on the way to ``key``, which ``tree`` lacks: its dotted key and its value."""
    found: list[str] = []
    for part in key.split("."):
        if part not in tree or not isinstance(tree[part], Mapping):
            break
        tree = tree[part]
        found.append(part)
    return ".".join(found), tree


def flow_yaml(value: Any) -> str:
    """Return a value as YAML in one line."""
    return yaml.safe_dump([value], default_flow_style=True, width=math.inf, allow_unicode=True).strip()[1:-1]


def _leaves(node: Any, path: str) -> Iterable[tuple[str, Any]]:
    if not isinstance(node, Mapping):
        yield path, node
        return
    for key, value in node.items():
        yield from _leaves(value, f"{path}.{key}" if path else str(key))


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"override {shortened(override)!r}: must have the form section.key=value")
    value = read_yaml(text, f"override {shortened(override)!r}")
    *sections, name = key.split(".")
    if not all((*sections, name)):
        raise ValueError(f"override {shortened(override)!r}: a part of the key is empty")
    node = tree
    for depth, section in enumerate(sections):
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ValueError(f"override {override!r}: {'.'.join(sections[: depth + 1])} is not a section")
    node[name] = value


def _plain(value: Any) -> Any:
    """Turn tuples into lists, for YAML."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
