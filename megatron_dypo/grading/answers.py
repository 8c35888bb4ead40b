"""What kind of thing an answer is: a number, a number in a base, a list, words or a formula; like compares with like.

Numbers are compared exactly. Formulas are left to the function that the caller brings, so that this file needs no
computer algebra.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from megatron_dypo.grading.cleaning import WORD, cleaned, latex, literal
from megatron_dypo.grading.rationals import Rational, read_rational, same_number
from megatron_dypo.grading.splitting import is_balanced, split_list, ungrouped
from megatron_dypo.grading.units import Unit, read_unit

SameFormula = Callable[[str, str], bool]
"""(gold, claim) in LaTeX -> whether they are equal."""


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A plain number, perhaps with a name (``x = 5``) and a unit."""

    number: Rational
    unit: Unit
    name: str | None
    text: str
    """The number as it is written."""


@dataclass(frozen=True, kw_only=True)
class Based:
    """A number in a base, as it is written: ``204_5``. It equals no number without that base."""

    digits: str
    base: str


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Several answers: without brackets or in set braces in any order, else (tuples, intervals) in theirs."""

    brackets: str
    """``(]`` for a half-open interval; empty for a bare list; ``{}`` for a set."""
    items: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Words:
    """An answer in words, case folded; or a ratio or time such as ``3:4``."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Formula:
    """Anything else: a cleaned text, its name taken off, and the words that stood in it."""

    text: str
    name: str | None
    words: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Unclear:
    """A text that states no one thing, such as two numbers with a space between; it equals only the same text."""


Answer = Quantity | Based | Listing | Words | Formula | Unclear

_BASED = re.compile(r"\(?([0-9A-F]+)\)?_(?:\{(\d+)\}|(\d+))")
_MIXED = re.compile(r"([-+]?)([\d ,\x04]*\d) ?(?:\\[dtc]?frac\{(\d+)\}\{(\d+)\}|(?<= )(\d+)/(\d+))")
_NAME = re.compile(
    r"(?P<name>\(?\\?[A-Za-z]+(?:_\{?\w+\}?)?'?(?:\([A-Za-z]\)|(?:,\s?[A-Za-z])+\))?)\s?(?:=|\\in(?![A-Za-z])|≈|\\approx(?![A-Za-z]))\s?"
)
_LEAD_WORDS = (
    "the final correct answer answers result solution solutions value values total is are equals equal to so therefore thus "
    "hence sum number of it we get have has"
).split()
_LEAD = re.compile(rf"(?:{WORD}?(?:{'|'.join(_LEAD_WORDS)})(?![A-Za-z])[ ,:]*)+", re.IGNORECASE)
_LEAD_END = re.compile(r"(?:is|are|equals?|to|:|get|have|has|so|thus|therefore|hence|answer|answers)[ ,:]*\Z", re.IGNORECASE)
_WORDS = re.compile(rf"{WORD}?[A-Za-z][A-Za-z'’-]*(?:[ ,.'’&-]+{WORD}?[A-Za-z][A-Za-z'’-]*)*")
_RATIO = re.compile(r"\d[\d.]*(?:\s?:\s?\d[\d.]*)+")
_UNCLEAR = re.compile(r"(?<![_^\d.,A-Za-z{])\d+(?:[.,]\d+)*\s+\d|,\s*,|^\s*,|\d_(?![{\d])")
_APPROXIMATION = re.compile(r"\s?(?:\\approx|≈|\\simeq)(?![A-Za-z])")
_RELATION = re.compile(
    r"[<>≤≥≠∼→≡]|!=|\\(?:leq?|geq?|leqslant|geqslant|neq?|not|lt|gt|to|rightarrow|mapsto|equiv|p?mod|bmod|sim|propto|mid|nmid)(?![A-Za-z])"
)
"""Signs that make a statement of a formula; one side with such a sign equals no side without."""
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{[a-z*]+\}(?:\{[a-z|]+\})?")
_FUNCTIONS = frozenset("sqrt sinh cosh tanh arcsin arccos arctan exp infty infinity binom".split())
_UNORDERED = ("", "{}")
_MAX_READ = 400
_MAX_FORMULA = 2000


def same_answer(gold: str, claim: str, same_formula: SameFormula) -> bool:
    """True if the texts ``gold`` and ``claim`` state the same answer.

    A list, set, tuple or interval equals only one of its own kind with as many members; a number equals a number;
    words equal the same words; and two formulas, or a formula and a number, are equal if ``same_formula`` says so.
    """
    gold, claim = cleaned(gold), cleaned(claim)
    if not gold or not claim:
        return False
    return literal(gold) == literal(claim) or _same(read_answer(gold), read_answer(claim), same_formula)


def read_answer(text: str) -> Answer:
    """Read a cleaned text; see :func:`megatron_dypo.grading.cleaning.cleaned`."""
    text = ungrouped(_without_lead(text).strip())
    quantity = _read_quantity(text)
    if quantity is not None:
        return quantity
    if _is_words(text):
        return Words(text=literal(text).casefold())
    if _RATIO.fullmatch(text):
        return Words(text=text.replace(" ", ""))
    listing = split_list(text)
    if listing is not None:
        return Listing(brackets=listing[0], items=listing[1])
    name, value = _split_name(text)
    based = _BASED.fullmatch(value)
    if based is not None:
        return Based(digits=based[1].lstrip("0") or "0", base=based[2] or based[3])
    listing = split_list(value) if name is not None else None
    if listing is not None:
        return Listing(brackets=listing[0], items=listing[1])
    if len(text) > _MAX_FORMULA or _UNCLEAR.search(value) or not is_balanced(value):
        return Unclear()
    value = _without_unit(value)
    return Formula(text=value, name=name, words=_words_of(value))


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
    # 50% is 50 where the question asks for per cent, and it is 0.5.
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
    """False if one side has words ("not 5", "x if y > 0") or a relation ("> 5", "x \\to 5") that the other has not."""
    texts = [one.text if isinstance(one, Formula) else "" for one in (gold, claim)]
    words = [one.words if isinstance(one, Formula) else () for one in (gold, claim)]
    related = [_RELATION.search(text) is not None for text in texts]
    return words[0] == words[1] and related[0] == related[1]


def _same_named(gold: Formula | Quantity, claim: Formula | Quantity, same_formula: SameFormula) -> bool:
    """``y = 2x`` equals ``2x``, and ``y = 2x`` as a whole equals ``x = y/2``."""
    is_equation = any(one.name is None and isinstance(one, Formula) and "=" in one.text for one in (gold, claim))
    if gold.name == claim.name or (None in (gold.name, claim.name) and not is_equation):
        return same_formula(_formula(gold), _formula(claim))
    first, second = (_formula(one) if one.name is None else f"{one.name}={_formula(one)}" for one in (gold, claim))
    return same_formula(first, second)


def _same_interval(gold: Answer, claim: Answer, same_formula: SameFormula) -> bool:
    """An interval may be written as inequalities or as a union."""
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
    if answer.number.is_decimal and answer.unit.scale == 1:
        return latex(answer.text).replace(" ", "")
    value = answer.number.value * answer.unit.scale
    return str(value.numerator) if value.denominator == 1 else f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _without_lead(text: str) -> str:
    """``text`` without "The answer is" in front."""
    lead = _LEAD.match(text)
    return text[lead.end() :] if lead is not None and _LEAD_END.search(lead[0]) else text


def _is_words(text: str) -> bool:
    """All of it is in ``\\text{…}``, or it is too long for a product of variables."""
    if not _WORDS.fullmatch(text):
        return False
    parts = re.findall(rf"{WORD}?[A-Za-z'’-]+", text)
    return all(part.startswith(WORD) for part in parts) or any(len(part) > 3 for part in parts)


def _words_of(formula: str) -> tuple[str, ...]:
    """The words in ``formula`` that are no functions and no products of a few variables."""
    found = re.findall(rf"{WORD}[A-Za-z]+|(?<![A-Za-z\\])[A-Za-z]{{4,}}", _ENVIRONMENT.sub(" ", formula))
    return tuple(word.lstrip(WORD) for word in found if word not in _FUNCTIONS)


def _split_name(text: str) -> tuple[str | None, str]:
    name = _NAME.match(text)
    if name is None:
        return None, _APPROXIMATION.split(_APPROXIMATION.sub("", text, count=1) if _APPROXIMATION.match(text) else text)[0]
    return literal(name["name"]).replace(" ", ""), _APPROXIMATION.split(text[name.end() :])[0]


def _read_quantity(text: str) -> Quantity | None:
    if len(text) > _MAX_READ:
        return None
    name, value = _split_name(text)
    for number, tail in _number_and_tail(value):
        rational = _read_mixed(number) or read_rational(number)
        unit = read_unit(tail) if rational is not None else None
        if rational is not None and unit is not None:
            return Quantity(number=rational, unit=unit, name=name, text=number.strip())
    return None


def _number_and_tail(text: str) -> list[tuple[str, str]]:
    """The ways to cut ``text`` behind a digit or a bracket, the latest cut first."""
    cuts = [match.end() for match in re.finditer(r"[\d})!.](?!\d)", text)]
    return [(text[:cut], text[cut:]) for cut in reversed(cuts) if cut == len(text) or text[cut] not in "^_"]


def _read_mixed(text: str) -> Rational | None:
    match = _MIXED.fullmatch(text.strip())
    if match is None:
        return None
    sign, spelled, *parts = (part for part in match.groups() if part is not None)
    whole = read_rational(spelled)
    above, below = (int(part) for part in parts)
    if whole is None or not above < below:
        return None
    return Rational((whole.value + Fraction(above, below)) * (-1 if sign == "-" else 1), False)


def _without_unit(text: str) -> str:
    for formula, tail in _number_and_tail(text) + [(text[: m.start()], text[m.start() :]) for m in re.finditer(WORD, text)]:
        if WORD in tail and read_unit(tail) is not None:
            return formula.rstrip()
    return text

