"""Strict reading of YAML: no duplicate keys, and one way to write a number.

This is PyYAML's safe loader with three changes. A key that occurs twice in a mapping is an error (PyYAML keeps the last
one). ``010``, ``1:30`` and ``0b1`` are texts, not integers; ``yes`` and ``on`` are texts, not booleans (YAML 1.2). A
document that is nested too deeply, or that aliases unfold to too many values, is an error.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_MAX_VALUES = 20_000
"""Most values in one document, counted with aliases unfolded. A config has about two hundred."""
_MAX_DEPTH = 50
_MAX_DIGITS = 300


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the rules of this module."""

    yaml_implicit_resolvers: dict[str, Any] = {  # noqa: RUF012 (PyYAML's own class attribute)
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("int", "float", "bool")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [key for key, _ in node.value]
        seen: set[Any] = set()
        for key_node in own:
            key = self.construct_object(key_node, deep=True)
            if key_node.tag != "tag:yaml.org,2002:merge" and isinstance(key, str | int | float | bool):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} stands twice in one mapping", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _add_resolver(tag: str, pattern: str, first: str) -> None:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first))


_add_resolver("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF")
_add_resolver("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", "-+0123456789")
_add_resolver(
    "float",
    r"^[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$",
    "-+0123456789.",
)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    if len(text) > _MAX_DIGITS:
        raise yaml.constructor.ConstructorError(
            None, None, f"an integer of {len(text)} digits: must have {_MAX_DIGITS} at most", node.start_mark
        )
    return int(text.replace("_", ""))


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = str(loader.construct_scalar(node)).lower().replace("_", "")
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def read_yaml(text: str, where: str) -> Any:
    """Return the value of a YAML document. ``where`` names the document in errors.

    Raises:
        ValueError: the text is not YAML, a key occurs twice, or a value exceeds a limit above; the line is named.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
        _require_reasonable(value)
    except RecursionError as error:
        raise ValueError(f"{where}: not the YAML of a config: nested too deeply") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not YAML: {error}") from error
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{where}: {error}") from error
    return value


def _require_reasonable(value: Any) -> None:
    """Raise ValueError if the document, with its aliases unfolded, exceeds a limit above."""
    left, waiting = _MAX_VALUES, [(value, 0)]
    while waiting:
        node, depth = waiting.pop()
        left -= 1
        if depth > _MAX_DEPTH or left < 0:
            limit = f"nested more than {_MAX_DEPTH} deep" if depth > _MAX_DEPTH else f"more than {_MAX_VALUES:,} values"
            raise ValueError(f"not the YAML of a config: {limit}")
        children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        waiting += [(child, depth + 1) for child in children]
