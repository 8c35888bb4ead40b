"""The configuration reference: every section and key with type, default and meaning, read off the dataclasses.

``megatron-dypo config`` prints it, ``megatron-dypo init`` takes its comments from it, and
``python -m megatron_dypo.config.reference > docs/configuration.md`` writes the page.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import re
import textwrap
import types
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_dypo.config.reading.load import flow_yaml
from megatron_dypo.config.reading.typed import section_of_mapping
from megatron_dypo.config.tree import Config

REQUIRED = ("model.hf_path", "data.prompts", "eval.sets.NAME.path")
"""Keys that every config must give; NAME stands for each name of a mapping."""

_KINDS = {int: "integer", float: "number", bool: "true or false", str: "text"}
_PLURALS = {int: "integers", float: "numbers", str: "texts"}
_WIDTH = 100

_HEAD = """# Configuration

Written by `python -m megatron_dypo.config.reference > docs/configuration.md`.
`megatron-dypo config [SECTION or KEY]` prints the same.

A config is a YAML file with these sections. A key that is left out has its default. On the command line
`section.key=value` overrides the file; the value is YAML (`[a, b]`, `null`, `1e-6`). A key that does not exist is an
error, which names the nearest one. Relative paths start at the directory in which the command runs.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """One key of the configuration."""

    path: str
    """``rollout.group_size``."""
    kind: str
    """Type in words: ``integer``, ``one of sync, async``."""
    default: Any
    text: str
    """Its docstring, in Markdown."""

    @property
    def is_required(self) -> bool:
        """Whether every config must give it."""
        return self.path in REQUIRED

    def facts(self) -> str:
        """Return type and default in one line."""
        fact = "required" if self.is_required else f"default `{flow_yaml(self.plain_default())}`"
        return f"{self.kind}; {fact}"

    def plain_default(self) -> Any:
        """Return the default as YAML has it: a tuple is a list."""
        return list(self.default) if isinstance(self.default, tuple) else self.default


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """One section: a dataclass of the tree, without the sections below it."""

    path: str
    text: str
    keys: tuple[Key, ...]


def sections() -> tuple[Section, ...]:
    """Return every section in the order of the tree; a section below another one follows it."""
    return tuple(_sections(Config, ""))


def find(path: str) -> tuple[Section, ...]:
    """Return the section ``path`` with the sections below it, or the one key ``path`` in its section.

    Raises:
        ValueError: there is no such section or key; the nearest one is named.
    """
    known = sections()
    found = tuple(section for section in known if section.path == path or section.path.startswith(f"{path}."))
    if found:
        return found
    for section in known:
        for key in section.keys:
            if key.path == path:
                return (dataclasses.replace(section, text="", keys=(key,)),)
    names = [name for section in known for name in (section.path, *(key.path for key in section.keys))]
    near = difflib.get_close_matches(path, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"sections: {', '.join(s.path for s in known if '.' not in s.path)}"
    raise ValueError(f"{path}: no such section or key; {hint}")


def to_text(shown: tuple[Section, ...]) -> str:
    """Return sections and keys for a terminal."""
    blocks = []
    for section in shown:
        lines = [f"{section.path}: {_unmarked(section.text)}"] if section.text else []
        for key in section.keys:
            lines += ["", f"  {key.path}  ({_unmarked(key.facts())})", textwrap.indent(_filled(key.text), " " * 6)]
        blocks.append("\n".join(lines).strip("\n"))
    return "\n\n".join(blocks)


def to_markdown() -> str:
    """Return the page ``docs/configuration.md``."""
    blocks = [_HEAD]
    for section in sections():
        blocks.append(f"## {section.path}\n\n{section.text}\n")
        blocks += [
            f"### {key.path}\n\n{key.facts()[0].upper()}{key.facts()[1:]}.\n\n{key.text}\n" for key in section.keys
        ]
    return "\n".join(blocks)


def _sections(kind: type, path: str) -> Iterator[Section]:
    hints, texts, keys, below = get_type_hints(kind), _field_texts(kind), [], []
    for field in dataclasses.fields(kind):
        inner = f"{path}.{field.name}" if path else field.name
        if dataclasses.is_dataclass(hints[field.name]):
            below.append((hints[field.name], inner))
        else:
            text = _markdown(texts.get(field.name, ""))
            if (values := section_of_mapping(hints[field.name])) is not None:
                below.append((values, f"{inner}.NAME"))
            keys.append(Key(path=inner, kind=_in_words(hints[field.name]), default=_default(field), text=text))
    if keys or path:
        yield Section(path=path, text=_markdown(inspect.getdoc(kind) or ""), keys=tuple(keys))
    for section, inner in below:
        yield from _sections(section, inner)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _field_texts(kind: type) -> dict[str, str]:
    """Return the string below each field; Python itself keeps none of them."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for statement, following in pairwise(definition.body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            found[statement.target.id] = inspect.cleandoc(following.value.value)
    return found


def _in_words(hint: Any) -> str:
    """Name a type as a user of YAML would."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (Union, types.UnionType):
        several = [_in_words(part) for part in parts if part is not type(None)]
        return " or ".join([*several, "null"] if type(None) in parts else several)
    if origin is tuple and parts[-1] is Ellipsis:
        return f"list of {_PLURALS.get(parts[0]) or _in_words(parts[0]).removeprefix('one of ')}"
    if origin is tuple:
        return f"[{', '.join(map(_in_words, parts))}]"
    if origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return "mapping"
    return "mapping" if dataclasses.is_dataclass(hint) else _KINDS[hint]


def _markdown(text: str) -> str:
    """Turn reStructuredText's marks into Markdown's."""
    return re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text.replace("``", "`"))


def _unmarked(text: str) -> str:
    return text.replace("`", "")


def _filled(text: str) -> str:
    return "\n\n".join(textwrap.fill(part, _WIDTH - 6) for part in _unmarked(text).split("\n\n"))


if __name__ == "__main__":
    print(to_markdown(), end="")
