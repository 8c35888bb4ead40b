"""Compare formulas by math-verify, and confirm its "equal" by numeric values.

Imported in verifier processes only: math-verify brings sympy, and some inputs keep it busy indefinitely.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import math_verify
import sympy

# math-verify warns that its timeouts are off. They are off because they use SIGALRM and raise a BaseException; the
# whole process has a limit of processor time instead.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_SUBSCRIPT = re.compile(r"\d\}?_")
_DIGITS = 50
_POINTS = (sympy.Rational(37, 29), sympy.Rational(53, 41), sympy.Rational(11, 17))
"""Values for the first, second, … variable, in turn. No common function has a special value there."""


def same_formula(gold: str, claim: str) -> bool:
    """Return whether math-verify calls the LaTeX formulas ``gold`` and ``claim`` equal and their values confirm it.

    math-verify alone is not enough: it rounds to six decimals (1/2004! equals 1/2006!) and drops subscripts (204_5
    equals 204_6). This function never returns for inputs such as ``9^{9^{9^9}}``: run it under a limit.
    """
    if _SUBSCRIPT.search(gold) or _SUBSCRIPT.search(claim):
        return False
    golds, claims = parsed(boxed(gold)), parsed(boxed(claim))
    if not math_verify.verify(golds, claims, timeout_seconds=None):
        return False
    return any(is_confirmed(a, b) for a in golds for b in claims if type(a) is not str and type(b) is not str)


def boxed(text: str) -> str:
    """Return ``text`` in a box: math-verify then reads all of it and does not look for a formula inside."""
    return "\\boxed{" + text + "}"


def parsed(text: str) -> list[Any]:
    """Return what math-verify finds in ``text``: sympy objects, then the text that it read."""
    found: list[Any] = math_verify.parse(text, parsing_timeout=None)
    return found


def is_confirmed(gold: Any, claim: Any) -> bool:
    """Return False if the values of two expressions differ; True for equations, intervals and sets, without a value."""
    if isinstance(gold, sympy.MatrixBase) and isinstance(claim, sympy.MatrixBase):
        return gold.shape == claim.shape and all(is_confirmed(a, b) for a, b in zip(gold, claim, strict=True))
    if not (isinstance(gold, sympy.Expr) and isinstance(claim, sympy.Expr)):
        return True
    variables = sorted(gold.free_symbols | claim.free_symbols, key=str)
    point = {variable: _POINTS[i % len(_POINTS)] + i for i, variable in enumerate(variables)}
    first, second = (_value(one.xreplace(point)) for one in (gold, claim))
    if first is None or second is None:
        return True
    size = max(abs(first), abs(second))
    is_rounded = gold.has(sympy.Float) or claim.has(sympy.Float)
    tolerance = sympy.Float("1e-6") * min(1, size) if is_rounded else size * sympy.Float("1e-40")
    return bool(abs(first - second) <= tolerance)


def _value(expression: sympy.Expr) -> Any:
    """Return the value of an expression to 50 digits; None if it has no finite value."""
    value = expression.evalf(_DIGITS)
    return value if value.is_number and value.is_finite and not value.free_symbols else None
