"""Find uses of other packages' public names in the text of a Python file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Use:
    """One use of a name."""

    line: int
    name: str
    """Dotted name from the package on."""
    positional: int = 0
    """Number of arguments by position, if it is called."""
    keywords: tuple[str, ...] = ()


def package_uses(source: str, prefixes: tuple[str, ...]) -> Iterator[Use]:
    """Yield each use of a name that begins with one of ``prefixes``.

    Uses are imports, attributes, calls, and the names of modules that ``find_spec`` is called with.
    """
    tree = ast.parse(source)
    aliases = dict(_aliases(tree))
    parts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute | ast.Name) and id(node) not in parts:
            found = [_dotted(node, aliases)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("find_spec"):
            found = [str(argument.value) for argument in node.args if isinstance(argument, ast.Constant)]
        else:
            continue
        call = called.get(id(node))
        for name in found:
            if any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes):
                yield _use(node, name, call)


def _use(node: ast.AST, name: str, call: ast.Call | None) -> Use:
    line = int(getattr(node, "lineno", 0))
    if call is None or any(isinstance(argument, ast.Starred) for argument in call.args):
        return Use(line=line, name=name)
    keywords = tuple(keyword.arg for keyword in call.keywords if keyword.arg)
    return Use(line=line, name=name, positional=len(call.args), keywords=keywords)


def _aliases(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (alias.asname, alias.name) if alias.asname else (alias.name.split(".")[0],) * 2
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _dotted(node: ast.expr, aliases: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return aliases.get(node.id, "")
    if isinstance(node, ast.Attribute) and (holder := _dotted(node.value, aliases)):
        return f"{holder}.{node.attr}"
    return ""
