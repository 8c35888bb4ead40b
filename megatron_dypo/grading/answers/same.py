"""Decide whether two answers are the same. Only answers of the same kind can be.

Numbers are compared exactly. The caller brings the function that compares formulas, so this file needs no computer
algebra.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from megatron_dypo.grading.answers.cleaning import MAX_LENGTH, cleaned, latex, literal
from megatron_dypo.grading.answers.rationals import Rational, same_number
from megatron_dypo.grading.answers.reading import (
    Answer,
    Formula,
    Listing,
    Quantity,
    Unclear,
    Words,
    commands_of,
    read_answer,
    variables_of,
)
from megatron_dypo.grading.answers.splitting import ungrouped

SameFormula = Callable[[str, str], bool]
"""(gold, claim) in LaTeX -> whether they are equal."""

_RELATION = re.compile(
    r"[<>≤≥≠∼→≡']|!=|\\(?:leq?|geq?|leqslant|geqslant|neq?|not|lt|gt|to|rightarrow|mapsto|equiv|p?mod|bmod|sim|propto|mid|nmid)"
    r"(?![A-Za-z])"
)
"""Signs that turn a formula into a statement. An answer with such a sign never equals one without."""
_UNORDERED = ("", "{}")
_MAX_WRITTEN_BITS = 4000
"""A larger number is passed on as the answer writes it (5000!): Python refuses to print more than 4,300 digits."""


def same_answer(gold: str, claim: str, same_formula: SameFormula) -> bool:
    """Return whether the texts ``gold`` and ``claim`` state the same answer.

    A list, set, tuple or interval equals only one of its own kind with the same number of members; a number equals a
    number; words equal the same words. For two formulas, or a formula and a number, ``same_formula`` decides.
    """
    gold, claim = cleaned(gold), cleaned(claim)
    if not gold or not claim:
        return False
    if literal(gold) == literal(claim):
        return True
    if max(len(gold), len(claim)) > MAX_LENGTH:
        return False
    read = read_answer(gold), read_answer(claim)
    if Words in map(type, read):
        return ungrouped(literal(gold)).casefold() == ungrouped(literal(claim)).casefold() or read[0] == read[1]
    return _same(*read, same_formula)


def _same(gold: Answer, claim: Answer, same_formula: SameFormula) -> bool:
    if isinstance(gold, Quantity) and isinstance(claim, Quantity):
        return _same_quantity(gold, claim)
    if isinstance(gold, Listing) and isinstance(claim, Listing):
        return _same_listing(gold, claim, same_formula)
    if isinstance(gold, Formula | Quantity) and isinstance(claim, Formula | Quantity):
        return _says_as_much(gold, claim) and _same_named(gold, claim, same_formula)
    if isinstance(gold, Unclear) or type(gold) is not type(claim):
        return _same_interval(gold, claim, same_formula)
    return gold == claim


def _same_quantity(gold: Quantity, claim: Quantity) -> bool:
    if gold.name is not None and claim.name is not None and gold.name != claim.name:
        return False
    units = gold.unit, claim.unit
    if None not in (gold.unit.dimension, claim.unit.dimension):
        if gold.unit.dimension != claim.unit.dimension:
            return False
        sizes = gold.unit.size, claim.unit.size
    else:
        sizes = Fraction(1), Fraction(1)
    first, second = (
        Rational(one.number.value * unit.scale * size, one.number.is_decimal)
        for one, unit, size in zip((gold, claim), units, sizes, strict=True)
    )
    if same_number(first, second):
        return True
    # 50% equals 50, if the question asks for per cent, and it equals 0.5.
    if gold.unit.is_percent == claim.unit.is_percent:
        return False
    percent, other = (first, second) if gold.unit.is_percent else (second, first)
    return same_number(Rational(percent.value / 100, percent.is_decimal), other)


def _same_listing(gold: Listing, claim: Listing, same_formula: SameFormula) -> bool:
    is_unordered = gold.brackets in _UNORDERED and claim.brackets in _UNORDERED
    if len(gold.items) != len(claim.items) or not (is_unordered or gold.brackets == claim.brackets):
        return False
    if not is_unordered:
        return all(same_answer(a, b, same_formula) for a, b in zip(gold.items, claim.items, strict=True))
    left = list(claim.items)
    for item in gold.items:
        match = next((one for one in left if same_answer(item, one, same_formula)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _says_as_much(gold: Formula | Quantity, claim: Formula | Quantity) -> bool:
    """Return False if one side has words ("not 5"), a relation ("> 5", "x \\to 5") or a variable that the other lacks.

    math-verify would call ``5m`` and 5 equal: it reads the m as a unit.
    """
    texts = [one.text if isinstance(one, Formula) else "" for one in (gold, claim)]
    words = [one.words if isinstance(one, Formula) else () for one in (gold, claim)]
    related = [_RELATION.search(text) is not None for text in texts]
    is_equation = any("=" in text for text in texts)
    variables = [variables_of(text) for text in texts]
    if commands_of(texts[0]) != commands_of(texts[1]):
        return False
    return words[0] == words[1] and related[0] == related[1] and (is_equation or variables[0] == variables[1])


def _same_named(gold: Formula | Quantity, claim: Formula | Quantity, same_formula: SameFormula) -> bool:
    """Compare formulas that may have names: ``y = 2x`` equals ``2x``, and as an equation it equals ``x = y/2``."""
    is_equation = any(one.name is None and isinstance(one, Formula) and "=" in one.text for one in (gold, claim))
    if gold.name == claim.name or (None in (gold.name, claim.name) and not is_equation):
        return same_formula(_formula(gold), _formula(claim))
    first, second = (_formula(one) if one.name is None else f"{one.name}={_formula(one)}" for one in (gold, claim))
    return same_formula(first, second)


def _same_interval(gold: Answer, claim: Answer, same_formula: SameFormula) -> bool:
    """Compare an interval with a formula: the formula may write it as inequalities or as a union."""
    pair = gold, claim
    intervals = [one for one in pair if isinstance(one, Listing) and len(one.items) == 2 and len(one.brackets) == 2]
    formulas = [one for one in pair if isinstance(one, Formula)]
    if len(intervals) != 1 or len(formulas) != 1 or not re.search(r"[<>]|\\(?:le|ge|lt|gt|cup)", formulas[0].text):
        return False
    texts = [
        latex(f"{one.brackets[0]}{','.join(one.items)}{one.brackets[1]}") if isinstance(one, Listing) else _formula(one)
        for one in pair
        if isinstance(one, Listing | Formula)
    ]
    return same_formula(texts[0], texts[1])


def _formula(answer: Formula | Quantity) -> str:
    if isinstance(answer, Formula):
        return latex(answer.text)
    value = answer.number.value * answer.unit.scale
    is_long = max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_WRITTEN_BITS
    if is_long or (answer.number.is_decimal and answer.unit.scale == 1):
        return latex(answer.text).replace(" ", "")
    return str(value.numerator) if value.denominator == 1 else f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
