"""Make mutants of a source file: changes of one expression or statement that look like real bugs."""

from __future__ import annotations

import ast
import copy
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_TURNED: dict[type[ast.cmpop], type[ast.cmpop]] = {ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Gt: ast.Lt, ast.GtE: ast.LtE}
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Pow: ast.Mult,
}  # fmt: skip
Node: TypeAlias = ast.expr | ast.stmt | ast.keyword
_FUNCTIONS = {
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "sorted": "list",
    "zeros": "ones",
    "ones": "zeros",
    "log1p": "log",
}
_DROPPED_METHODS = {
    "detach",
    "abs",
    "double",
    "mean",
    "exp",
    "sum",
    "bool",
    "contiguous",
    "clone",
    "copy",
    "strip",
    "float",
}
ALIKE = (
    ("clip_low", "clip_high"), ("old_logp", "ref_logp", "rollout_logp"), ("num_sequences", "num_response_tokens"),
    ("alpha", "gamma"), ("beta_gal", "kl_coef"), ("reward", "is_correct"), ("surrogate", "kl", "nll"),
    ("order", "member"),
    ("is_token_masked", "is_sequence_masked", "is_capped"), ("tokens_T", "targets_T"),
    ("updates_left", "policy_version"),
    ("linear", "quadratic", "response"), ("used", "length"), ("prompts", "sequences", "response_tokens"),
    ("token_bounds", "sequence_bounds"), ("DISTILL", "REINFORCE", "DROP"), ("EASY", "MID", "HARD"),
    ("waiting", "batch"),
    ("num_attention_heads", "num_key_value_heads"), ("hidden_size", "ffn_hidden_size"), ("version", "step"),
    ("values", "keys"),
    ("old_logp_T", "ref_logp_T", "rollout_logp_T"), ("kl_T", "nll_T", "surrogate_T"), ("visit", "order"),
    ("append", "extend"),
    ("answer", "source", "text"), ("prompt_tokens", "response_tokens"), ("normalize_std", "is_on"), ("first", "width"),
)  # fmt: skip
"""Attributes and words of one type that are easily confused."""


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One change: bytes ``start`` to ``end`` of ``path`` become ``new``."""

    path: str
    function: str
    """Qualified name, or "" at the top of the module."""
    line: int
    text: str
    """The first line that it changes, stripped."""
    start: int
    end: int
    old: str
    new: str
    rule: str

    @property
    def key(self) -> tuple[str, ...]:
        """Return a name of the mutant that stays the same when lines move."""
        return self.path, self.function, self.text, self.old, self.new

    def apply(self, source: bytes) -> bytes:
        """Return the source with the change."""
        return source[: self.start] + self.new.encode() + source[self.end :]

    def __str__(self) -> str:
        return f"{self.path}:{self.line} {self.function} [{self.rule}]\n    - {self.old}\n    + {self.new}"


def mutants_of(path: str, source: str) -> list[Mutant]:
    """Return every mutant of a file that still compiles, in the order of the text."""
    finder = _Finder(path, source)
    finder.visit(ast.parse(source))
    unique = {(m.start, m.end, m.new): m for m in finder.found}
    return sorted(unique.values(), key=lambda m: (m.start, m.end, m.new))


def sample(mutants: list[Mutant], count: int, seed: int) -> list[Mutant]:
    """Draw ``count`` mutants from the rules in turn, so that frequent rules do not crowd out the others."""
    rng = random.Random(seed)
    by_rule: dict[str, list[Mutant]] = {}
    for mutant in mutants:
        by_rule.setdefault(mutant.rule, []).append(mutant)
    for members in by_rule.values():
        rng.shuffle(members)
    chosen: list[Mutant] = []
    while len(chosen) < count and any(by_rule.values()):
        for members in by_rule.values():
            if members and len(chosen) < count:
                chosen.append(members.pop())
    return sorted(chosen, key=lambda m: (m.path, m.start, m.new))


class _Finder(ast.NodeVisitor):
    """A visitor of code that runs. It skips annotations, docstrings, messages, assertions and imports."""

    def __init__(self, path: str, source: str) -> None:
        self.path, self.source, self.found = path, source.encode(), list[Mutant]()
        self._names: list[str] = []
        self._starts = [0]
        for line in self.source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._names.append(node.name)
        for item in (*node.args.defaults, *filter(None, node.args.kw_defaults), *node.body):
            self.visit(item)
        self._names.pop()

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._names.append(node.name)
        for item in node.body:
            self.visit(item)
        self._names.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):
            return
        if isinstance(node.value, (ast.Call, ast.Await)) and not _is_logging(node.value):
            self._add(node, "pass", "call removed")
        self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> None: ...

    def visit_Raise(self, node: ast.Raise) -> None: ...

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Skip f-strings: before Python 3.12 positions inside them are not those of the file."""

    def visit_Import(self, node: ast.Import) -> None: ...

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None: ...

    def visit_If(self, node: ast.If) -> None:
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            self._add(node.test, f"(not ({ast.unparse(node.test)}))", "condition turned")
            self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if type(node.op) in _ARITHMETIC:
            self._change(node, "arithmetic", op=_ARITHMETIC[type(node.op)]())
        self.visit(node.value)

    def visit_Compare(self, node: ast.Compare) -> None:
        for table, rule in ((_COMPARISONS, "comparison at its bound"), (_TURNED, "comparison turned")):
            for i, op in enumerate(node.ops):
                if type(op) in table:
                    self._change(node, rule, ops=[*node.ops[:i], table[type(op)](), *node.ops[i + 1 :]])
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if not (
            isinstance(node.op, ast.Mod) and isinstance(node.left, ast.Constant) and isinstance(node.left.value, str)
        ):
            if type(node.op) in _ARITHMETIC:
                self._change(node, "arithmetic", op=_ARITHMETIC[type(node.op)]())
            if not isinstance(node.op, (ast.Mod, ast.FloorDiv)):
                self._add(node, f"({ast.unparse(node.left)})", "term dropped")
                if isinstance(node.op, (ast.Add, ast.Mult, ast.BitAnd, ast.BitOr)):
                    self._add(node, f"({ast.unparse(node.right)})", "term dropped")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self._change(node, "and/or", op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        for i in range(len(node.values)):
            rest = [*node.values[:i], *node.values[i + 1 :]]
            text = ast.unparse(rest[0]) if len(rest) == 1 else ast.unparse(ast.BoolOp(op=node.op, values=rest))
            self._add(node, f"({text})", "term dropped")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        self._add(node, f"({ast.unparse(node.operand)})", "sign or negation dropped")
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._add(node, f"({ast.unparse(node.body)})", "branch always taken")
        self._add(node, f"({ast.unparse(node.orelse)})", "branch never taken")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if _is_logging(node):
            return
        function = node.func
        if len(node.args) >= 2 and not any(isinstance(a, ast.Starred) for a in node.args[:2]):
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            first = 1 if name == "where" and len(node.args) == 3 else 0
            swapped = [*node.args]
            swapped[first], swapped[first + 1] = swapped[first + 1], swapped[first]
            if name not in ("isinstance", "getattr", "min", "max", "maximum", "minimum"):
                self._change(node, "arguments swapped", args=swapped)
        for i, keyword in enumerate(node.keywords):
            if keyword.arg is not None:
                self._change(node, "keyword dropped", keywords=[*node.keywords[:i], *node.keywords[i + 1 :]])
        if isinstance(function, ast.Name) and function.id in _FUNCTIONS:
            new = ast.Name(_FUNCTIONS[function.id], ast.Load())
            keywords = [] if new.id == "list" else node.keywords
            self._change(node, "neighbouring function", func=new, keywords=keywords)
        if isinstance(function, ast.Attribute):
            if function.attr in _FUNCTIONS:
                self._change(
                    node,
                    "neighbouring function",
                    func=ast.Attribute(function.value, _FUNCTIONS[function.attr], ast.Load()),
                )
            if function.attr in _DROPPED_METHODS and not isinstance(function.value, ast.Name | ast.Constant):
                self._add(node, f"({ast.unparse(function.value)})", "call removed")
            elif function.attr in _DROPPED_METHODS and isinstance(function.value, ast.Name) and not node.args:
                self._add(node, function.value.id, "call removed")
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        for other in _alike(node.attr):
            self._change(node, "wrong field", attr=other)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self._add(node, str(not value), "constant")
        elif isinstance(value, int):
            self._add(node, str(value + 1), "off by one")
            if value > 0:
                self._add(node, str(value - 1), "off by one")
        elif isinstance(value, float):
            self._add(node, repr(value + 1.0 if value == 0 else 2 * value), "constant")
        elif isinstance(value, str):
            for other in _alike(value):
                self._add(node, repr(other), "wrong field")

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if isinstance(node.slice, ast.Slice) and not isinstance(node.ctx, ast.Store):
            for part in ("lower", "upper"):
                if getattr(node.slice, part) is not None:
                    shorter = copy.copy(node.slice)
                    setattr(shorter, part, None)
                    self._change(node, "slice opened", slice=shorter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for condition in node.ifs:
            self._add(condition, "True", "filter removed")
        self.generic_visit(node)

    def _change(self, node: Node, rule: str, **fields: object) -> None:
        changed = copy.copy(node)
        for name, value in fields.items():
            setattr(changed, name, value)
        text = ast.unparse(changed)
        self._add(node, text if isinstance(node, (ast.stmt, ast.Attribute)) else f"({text})", rule)

    def _add(self, node: Node, new: str, rule: str) -> None:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = self._starts[node.lineno - 1] + node.col_offset
        end = self._starts[node.end_lineno - 1] + node.end_col_offset
        old = self.source[start:end].decode()
        text = self.source.splitlines()[node.lineno - 1].decode().strip()
        mutant = Mutant(
            path=self.path, text=text, function=".".join(self._names), line=node.lineno, start=start, end=end, old=old,
            new=new, rule=rule,
        )  # fmt: skip
        if "".join(old.split()) != "".join(new.split()) and _compiles(mutant.apply(self.source)):
            self.found.append(mutant)


def _alike(word: str) -> Iterator[str]:
    for row in ALIKE:
        if word in row:
            yield row[(row.index(word) + 1) % len(row)]


def _is_logging(node: ast.AST) -> bool:
    function = getattr(node, "func", None)
    return (
        isinstance(function, ast.Attribute)
        and isinstance(function.value, ast.Name)
        and function.value.id in ("log", "logger")
    )


def _compiles(source: bytes) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("error", SyntaxWarning)
        try:
            compile(source, "mutant", "exec")
        except (SyntaxError, SyntaxWarning):
            return False
    return True
