"""Find uses of other packages' private names in the text of a Python file."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterable, Iterator

OWN = {"self", "cls"}
STANDARD = {("os", "_exit"), ("sys", "_current_frames"), ("super()", "_open")}
"""Names of Python's library that may be used: two are documented; ``logging`` opens a handler's file by ``_open``."""
BUILTINS = {"getattr", "setattr", "hasattr", "delattr"}


def is_private(name: str) -> bool:
    """Return whether a name begins with one underscore."""
    return name.startswith("_") and not name.startswith("__") and name != "_"


def private_uses(source: str, own: Iterable[str] = ()) -> list[str]:
    """Return "line: expression" for each use of a private name that neither the file defines nor ``own`` has."""
    tree = ast.parse(source)
    known = {*defined_names(source), *own}
    return [*_imports(tree), *_attributes(tree, known), *_strings(tree), *_overrides(tree)]


def defined_names(source: str) -> set[str]:
    """Return functions, methods, fields and attributes of ``self`` that a file defines."""
    names = set[str]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) in OWN:
            names.add(node.attr)
    return names


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names]
        else:
            continue
        for path in paths:
            if any(map(is_private, path.split("."))):
                yield f"{node.lineno}: import {path}"


def _attributes(tree: ast.AST, own: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not is_private(node.attr):
            continue
        holder = ast.unparse(node.value)
        if node.attr not in own and (holder, node.attr) not in STANDARD:
            yield f"{node.lineno}: {holder}.{node.attr}"


def _strings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BUILTINS:
            for argument in node.args[1:2]:
                if isinstance(argument, ast.Constant) and is_private(str(argument.value)):
                    yield f"{node.lineno}: {ast.unparse(node)}"


def _overrides(tree: ast.AST) -> Iterator[str]:
    """Return private methods by which a class overrides a method of its base in torch or Megatron."""
    modules = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("torch", "megatron")
        for alias in node.names
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef):
            continue
        for base in node.bases:
            if not isinstance(base, ast.Name) or base.id not in modules:
                continue
            module, name = modules[base.id]
            upstream = getattr(importlib.import_module(module), name)
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and is_private(item.name) and hasattr(upstream, item.name):
                    yield f"{item.lineno}: {node.name}.{item.name} overrides {base.id}.{item.name}"
