"""Equality of formulas by math-verify, and a numeric check of what it calls equal.

Imported in verifier processes only: math-verify brings sympy, and some inputs keep it busy indefinitely.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import math_verify
import sympy

# It warns that its timeouts are off. They are off because they use SIGALRM and raise a BaseException; the deadline
# that counts is the one on this process.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_SUBSCRIPT = re.compile(r"\d\}?_")
_DIGITS = 50
_POINTS = (sympy.Rational(37, 29), sympy.Rational(53, 41), sympy.Rational(11, 17))
"""Values for the first, second, … variable, in turn: no special points of common functions."""


def same_formula(gold: str, claim: str) -> bool:
    """True if math-verify calls the LaTeX formulas ``gold`` and ``claim`` equal and their values confirm it.

    math-verify rounds to six decimals (so that 1/2004! is 1/2006!) and drops subscripts (so that 204_5 is 204_6).
    Never returns for inputs such as ``9^{9^{9^9}}``: run it under a deadline.
    """
    if _SUBSCRIPT.search(gold) or _SUBSCRIPT.search(claim):
        return False
    golds, claims = parsed(boxed(gold)), parsed(boxed(claim))
    if not math_verify.verify(golds, claims, timeout_seconds=None):
        return False
    return any(is_confirmed(a, b) for a in golds for b in claims if type(a) is not str and type(b) is not str)


def boxed(text: str) -> str:
    """``text`` in a box, where math-verify reads it as it is, without looking for a formula in it."""
    return "\\boxed{" + text + "}"


def parsed(text: str) -> list[Any]:
    """What math-verify finds in ``text``: sympy objects, then the text that it read."""
    return math_verify.parse(text, parsing_timeout=None)


def is_confirmed(gold: Any, claim: Any) -> bool:
    """Return False if the values of two expressions differ; True for what has no value (equations, intervals, sets)."""
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
    """Its value with 50 digits; None if it has none that is finite."""
    value = expression.evalf(_DIGITS)
    return value if value.is_number and value.is_finite and not value.free_symbols else None
