"""Read an answer as one of these kinds: a number, a number in a base, a list, words or a formula."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from megatron_dypo.grading.answers.cleaning import WORD, literal
from megatron_dypo.grading.answers.rationals import Rational, read_rational
from megatron_dypo.grading.answers.splitting import is_balanced, split_list, ungrouped
from megatron_dypo.grading.answers.units import Unit, read_unit


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A plain number, perhaps with a name (``x = 5``) and a unit."""

    number: Rational
    unit: Unit
    name: str | None
    text: str
    """The number as the answer writes it."""


@dataclass(frozen=True, kw_only=True)
class Based:
    """A number written with its base: ``204_5``. It equals no number without that base."""

    digits: str
    base: str


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Several answers. Their order counts in tuples and intervals, but not in sets and lists without brackets."""

    brackets: str
    """``(]`` for a half-open interval; empty for a bare list; ``{}`` for a set."""
    items: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Words:
    """An answer in words, with its case folded; or a ratio or time such as ``3:4``."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Formula:
    """Any other answer: a cleaned text without its name, and the words in it."""

    text: str
    name: str | None
    words: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Unclear:
    """A text without one clear meaning, such as two numbers with a space between or broken LaTeX. It equals only the
    same text."""


Answer = Quantity | Based | Listing | Words | Formula | Unclear

_BASED = re.compile(r"\(?([0-9A-F]+)\)?_(?:\{(\d+)\}|(\d+))")
_MIXED = re.compile(r"([-+]?)([\d ,\x04]*\d) ?(?:\\[dtc]?frac\{(\d+)\}\{(\d+)\}|(?<= )(\d+)/(\d+))")
_REPEATING = re.compile(r"([-+]?)(\d{0,99})\.(\d{0,99})\\(?:overline|bar)\{(\d{1,99})\}")
_NAME = re.compile(
    r"(?P<name>\(?\\?[A-Za-z]+(?:_\{?\w+\}?)?'?(?:\([A-Za-z]\)|(?:,\s?[A-Za-z])+\))?)"
    r"\s?(?:=|\\in(?![A-Za-z])|≈|\\approx(?![A-Za-z]))\s?"
)
_LEAD_WORDS_TEXT = """
the final correct answer answers result solution solutions value values total is are equals equal to so
therefore thus hence sum number of it we get have has
"""
_LEAD_WORDS = frozenset(_LEAD_WORDS_TEXT.split())
_LEAD = re.compile(rf"(?:{WORD}?(?:{'|'.join(sorted(_LEAD_WORDS))})(?![A-Za-z])[ ,:]*)+", re.IGNORECASE)
_LEAD_END = re.compile(
    r"(?:is|are|equals?|to|:|get|have|has|so|thus|therefore|hence|answer|answers)[ ,:]*\Z", re.IGNORECASE
)
_WORDS = re.compile(rf"{WORD}?[A-Za-z][A-Za-z'’-]*(?:[ ,.&]+{WORD}?[A-Za-z][A-Za-z'’-]*)*")
_RATIO = re.compile(r"\d[\d.]*(?:\s?:\s?\d[\d.]*)+")
_UNCLEAR = re.compile(
    r"(?<![_^\d.,A-Za-z{])\d+(?:[.,]\d+)*\.?\s+\d"  # two numbers with a space between
    r"|,\s*,|^\s*,|\d_(?![{\d])|^[_^!*/]|\?|%(?!\s*\Z)|\d\.\s*[-+(\\A-Za-z]"
    r"|\\[dtc]?frac(?![A-Za-z]|\s?\{)|\\sqrt(?![A-Za-z]|\s?[\[{\d]|\s[A-Za-z])"
    r"|(?:[-+*/^_=]|\\(?:cdot|times|div|pm|mp)(?![A-Za-z]))\s*\Z"
)
_APPROXIMATION = re.compile(r"\s?(?:\\approx|≈|\\simeq)(?![A-Za-z])")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{[a-z*]+\}(?:\{[a-z|]+\})?")
_FUNCTIONS_TEXT = """
sqrt sinh cosh tanh arcsin arccos arctan exp infty infinity binom sin cos tan cot sec csc log ln pi inf
"""
_FUNCTIONS = frozenset(_FUNCTIONS_TEXT.split())
_KNOWN_COMMANDS_TEXT = """
frac dfrac tfrac cfrac sqrt pi cdot times div pm mp begin end infty cup cap in setminus binom dbinom tbinom
sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp lg max min gcd
alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta kappa lambda mu nu xi rho sigma tau phi varphi chi psi
omega Gamma Delta Theta Lambda Sigma Phi Psi Omega
lfloor rfloor lceil rceil vert lvert rvert le leq ge geq ne neq lt gt leqslant geqslant circ mathbb
"""
_KNOWN_COMMANDS = frozenset(_KNOWN_COMMANDS_TEXT.split())
_LETTERS = frozenset("abcdfghjklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_MAX_READ = 400
_MAX_FORMULA = 2000


def read_answer(text: str) -> Answer:
    """Read a text that :func:`megatron_dypo.grading.answers.cleaning.cleaned` has cleaned."""
    text = ungrouped(_without_lead(text).strip())
    listing = split_list(text) if text.startswith("(") else None
    if listing is not None and listing[0]:  # Before numbers are read: (1,100) is not 1100.
        return Listing(brackets=listing[0], items=listing[1])
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
    last = _last_of_chain(name, value)
    if last is not None:
        answer = read_answer(last)
        return replace(answer, name=name) if isinstance(answer, Quantity | Formula) else answer
    listing = split_list(value) if name is not None else None
    if listing is not None:
        return Listing(brackets=listing[0], items=listing[1])
    if len(text) > _MAX_FORMULA or _UNCLEAR.search(value) or not is_balanced(value):
        return Unclear()
    value = _without_unit(value)
    return Formula(text=value, name=name, words=_words_of(value))


def _last_of_chain(name: str | None, value: str) -> str | None:
    """Return the last part of a chain such as ``x = 5 + 6 = 11``; None for one equation, and for inequalities."""
    if re.search(r"[<>!]", value) or value.count("=") < (1 if name is not None else 2):
        return None
    return value.rpartition("=")[2].strip() or None


def _without_lead(text: str) -> str:
    """Return ``text`` without "The answer is" in front."""
    lead = _LEAD.match(text)
    return text[lead.end() :] if lead is not None and _LEAD_END.search(lead[0]) else text


def _is_words(text: str) -> bool:
    """Return whether ``text`` is words: all in ``\\text{…}``, or one too long for a product of variables."""
    if not _WORDS.fullmatch(text):
        return False
    parts = re.findall(rf"{WORD}?[A-Za-z'’-]+", text)
    return all(part.startswith(WORD) for part in parts) or any(len(part) > 3 for part in parts)


def _words_of(formula: str) -> tuple[str, ...]:
    """Return the words in ``formula`` that are neither functions nor products of a few variables."""
    found = re.findall(rf"{WORD}[A-Za-z]+|(?<![A-Za-z\\])[A-Za-z]{{4,}}", _ENVIRONMENT.sub(" ", formula))
    return tuple(word.lstrip(WORD) for word in found if word not in _FUNCTIONS)


def commands_of(formula: str) -> set[str]:
    """Return the LaTeX commands of ``formula`` that math-verify may skip: all but those that it is known to read."""
    return set(re.findall(r"\\([A-Za-z]+)", formula)) - _KNOWN_COMMANDS


def variables_of(formula: str) -> set[str]:
    """Return the letters outside LaTeX commands and function names, without e and i, which are numbers."""
    bare = re.sub(r"\\[A-Za-z]+|" + WORD + "[A-Za-z]+", " ", _ENVIRONMENT.sub(" ", formula))
    return set(re.sub("|".join(sorted(_FUNCTIONS, key=len, reverse=True)), " ", bare)) & _LETTERS


def _split_name(text: str) -> tuple[str | None, str]:
    name = _NAME.match(text)
    if name is None:
        return None, _APPROXIMATION.split(
            _APPROXIMATION.sub("", text, count=1) if _APPROXIMATION.match(text) else text
        )[0]
    return literal(name["name"]).replace(" ", ""), _APPROXIMATION.split(text[name.end() :])[0]


def _read_quantity(text: str) -> Quantity | None:
    if len(text) > _MAX_READ:
        return None
    name, value = _split_name(text)
    for number, tail in _number_and_tail(value):
        rational = _read_mixed(number) or _read_repeating(number) or read_rational(number)
        unit = read_unit(tail) if rational is not None else None
        if rational is not None and unit is not None:
            return Quantity(number=rational, unit=unit, name=name, text=number.strip())
    return None


def _number_and_tail(text: str) -> list[tuple[str, str]]:
    """Return each way to cut ``text`` in two after a digit or a bracket, the last cut first."""
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


def _read_repeating(text: str) -> Rational | None:
    """Read a repeating decimal: ``0.1\\overline{6}`` is 1/6."""
    match = _REPEATING.fullmatch(text.strip())
    if match is None:
        return None
    sign, whole, fixed, repeated = match.groups()
    period = Fraction(int(repeated), (10 ** len(repeated) - 1) * 10 ** len(fixed))
    value = Fraction(f"{whole or 0}.{fixed or 0}") + period
    return Rational(-value if sign == "-" else value, False)


def _without_unit(text: str) -> str:
    for formula, tail in _number_and_tail(text) + [
        (text[: m.start()], text[m.start() :]) for m in re.finditer(WORD, text)
    ]:
        if WORD in tail and read_unit(tail) is not None:
            return formula.rstrip()
    return text
