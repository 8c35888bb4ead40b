"""Look names up in the source of a package, without importing it: also in a version that is not installed."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

Scope = ast.Module | ast.ClassDef


@dataclass(frozen=True, kw_only=True)
class Found:
    """A name that is there."""

    takes: tuple[str, ...] | None = None
    """Parameters of a function, or of making an object of a class. None: the source does not say."""
    takes_more: bool = False
    """Whether it takes any other arguments too."""

    def lacks(self, positional: int, keywords: Sequence[str]) -> list[str]:
        """Return the arguments of a call that it does not take."""
        if self.takes is None or self.takes_more:
            return []
        lacking = [keyword for keyword in keywords if keyword not in self.takes]
        return [*lacking, *(f"argument {positional}" for _ in range(positional > len(self.takes)))]


class Sources:
    """The Python files and stubs below a folder that holds packages."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def find(self, dotted: str) -> Found | None:
        """Return what a dotted name is. Attributes of values that a source does not describe count as found."""
        return self._find(dotted, frozenset())

    def public_names(self, module: str) -> set[str]:
        """Return the names without an underscore that a module defines or imports, also by ``*``."""
        names: set[str] = set()
        for statement in self._statements(module):
            names |= _names(statement)
            if isinstance(statement, ast.ImportFrom):
                names |= {alias.asname or alias.name for alias in statement.names} - {"*"}
                if statement.names[0].name == "*":
                    names |= self.public_names(self._source(module, statement))
        return {name for name in names if not name.startswith("_")}

    def _find(self, dotted: str, seen: frozenset[tuple[str, str]]) -> Found | None:
        parts = dotted.split(".")
        for length in range(len(parts), 0, -1):
            if self._file(".".join(parts[:length])) is not None:
                return self._inside(".".join(parts[:length]), parts[length:], seen)
        return None

    def _inside(self, module: str, names: Sequence[str], seen: frozenset[tuple[str, str]]) -> Found | None:
        """Look into a module; ``seen`` are the modules and names that an import led through, which may be a circle."""
        if not names:
            return Found()
        if (module, names[0]) in seen:
            return None
        if found := self._defined(module, self._statements(module), names):
            return found
        seen |= {(module, names[0])}
        for statement in self._statements(module):
            if isinstance(statement, ast.ImportFrom):
                source = self._source(module, statement)
                for alias in statement.names:
                    if alias.name == "*" and (found := self._inside(source, names, seen)):
                        return found
                    path = ".".join([source, alias.name, *names[1:]])
                    if (alias.asname or alias.name) == names[0] and (found := self._find(path, seen)):
                        return found
        return Found() if self._file(f"{module}.{names[0]}") else None

    def _defined(self, module: str, statements: Sequence[ast.stmt], names: Sequence[str]) -> Found | None:
        same = [statement for statement in statements if names[0] in _names(statement)]
        if not same:
            return None
        if isinstance(same[0], ast.ClassDef):
            return self._in_class(module, same[0], names[1:])
        functions = [one for one in same if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]
        return _signature(functions, is_method=False) if functions else Found()

    def _in_class(self, module: str, owner: ast.ClassDef, names: Sequence[str]) -> Found | None:
        body = list(_flat(owner.body))
        wanted = names[0] if names else "__init__"
        methods = [one for one in body if isinstance(one, ast.FunctionDef) and one.name == wanted]
        if methods:
            return _signature(methods, is_method=True)
        if names and (found := self._defined(module, body, names)):
            return found
        fields = [one.target.id for one in body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)]
        if not names and any("dataclass" in ast.unparse(one) for one in owner.decorator_list):
            return Found(takes=tuple(fields))
        bases = (self._inside(module, [*ast.unparse(base).split("."), *names], frozenset()) for base in owner.bases)
        inherited = next((found for found in bases if found), None)
        return inherited or (None if names else Found())

    def _source(self, module: str, statement: ast.ImportFrom) -> str:
        if not statement.level:
            return statement.module or ""
        file = self._file(module)
        package = module.split(".")
        up = statement.level - (file is not None and file.stem == "__init__")
        return ".".join([*package[: len(package) - up], *([statement.module] if statement.module else [])])

    def _file(self, module: str) -> Path | None:
        path = self._root.joinpath(*module.split("."))
        candidates = (path / "__init__.py", path.with_suffix(".py"), path.with_suffix(".pyi"), path / "__init__.pyi")
        return next((file for file in candidates if file.is_file()), None)

    @functools.cache  # noqa: B019, a few objects in a test
    def _statements(self, module: str) -> tuple[ast.stmt, ...]:
        file = self._file(module)
        return tuple(_flat(ast.parse(file.read_text(encoding="utf-8")).body)) if file else ()


def _flat(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements, those of ``if``, ``try`` and ``with`` too."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try | ast.With):
            for part in ("body", "orelse", "finalbody"):
                yield from _flat(getattr(statement, part, []))
            for handler in getattr(statement, "handlers", []):
                yield from _flat(handler.body)


def _names(statement: ast.stmt) -> set[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Assign):
        targets = [part for target in statement.targets for part in getattr(target, "elts", [target])]
        return {part.id for part in targets if isinstance(part, ast.Name)}
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return {statement.target.id}
    if isinstance(statement, ast.Import):
        return {alias.asname or alias.name.split(".")[0] for alias in statement.names}
    return set()


def _signature(functions: Sequence[ast.FunctionDef | ast.AsyncFunctionDef], *, is_method: bool) -> Found:
    """Return all parameters of a function and its overloads."""
    takes: dict[str, None] = {}
    more = False
    for function in functions:
        arguments = function.args
        of_object = is_method and not any("staticmethod" in ast.unparse(one) for one in function.decorator_list)
        parameters = [*arguments.posonlyargs, *arguments.args][of_object:] + arguments.kwonlyargs
        takes |= dict.fromkeys(parameter.arg for parameter in parameters)
        more |= arguments.vararg is not None or arguments.kwarg is not None
    return Found(takes=tuple(takes), takes_more=more)
