"""Read plain numbers in LaTeX or in text, and compare them exactly."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

TIGHT_COMMA = "\x04"
"""A comma that can only stand inside a number: ``{,}`` or ``,\\!``; see :func:`tightened`."""

_TIGHT = re.compile(r"\{\s?,\s?\}|,\\!\s?")
_SPACES = re.compile(r"(?<!\\)\\[,;:! >]|\\thinspace(?![A-Za-z])|~|[\u00a0\u2002-\u200a\u202f\u205f]")
_THOUSANDS = r"[1-9]\d{0,2}(?:(?:,\d{3})+|(?:\x04\d{3})+|(?: \d{3})+)(?![\d]|[,\x04 ]\d)"
_NUMBER = re.compile(rf"(?P<whole>{_THOUSANDS}|\d*)(?P<decimals>\.\d+)?(?:[eE](?P<exponent>[+-]?\d{{1,4}}))?")
_POWER = re.compile(r"\^(?:\{([+-]?\d{1,6})\}|([+-]?\d{1,6}))")
_FRAC = re.compile(r"\\[dtc]?frac(?![A-Za-z])")
_OPERATOR = re.compile(r"/|\\times|\\cdot|\\div|\*|×|÷|·")
_BLANKS = re.compile(r"\s*\n\s*|\s+")
_NOISE = re.compile(r"(?<![\d,\x04])[ \n]|[ \n](?!\d)|\\left(?![A-Za-z])|\\right(?![A-Za-z])|\\?\$")
"""Characters that do not change a number that they are in. A space between two digits is none of them."""
_MAX_LENGTH = 400
_MAX_DEPTH = 20
_MAX_BITS = 100_000
_MAX_FACTORIAL = 5000


@dataclass(frozen=True)
class Rational:
    """A number and how it was written."""

    value: Fraction
    is_decimal: bool
    """Whether it has a decimal point: then it may be a rounded value."""


def tightened(text: str) -> str:
    """Return ``text`` with one spelling for each kind of thousands separator.

    ``{,}`` and ``,\\!`` become :data:`TIGHT_COMMA`; thin, non-breaking and other LaTeX spaces become a space.
    """
    return _SPACES.sub(" ", _TIGHT.sub(TIGHT_COMMA, text)).replace("−", "-")


def read_rational(text: str) -> Rational | None:
    """Return the exact number that ``text`` writes; None if it writes anything but a plain rational number.

    Plain numbers are: an integer, a decimal, ``1.5e-7``, a quotient ``a/b`` or ``\\frac{a}{b}``, an integer power, a
    factorial, and products of these (``1.6 \\times 10^{-19}``), with or without a sign in front. A number with
    thousands separators has one to three digits and then groups of three, all after the same separator: a comma
    without a space, or a thin or plain space. So ``32,349`` and ``32 349`` are numbers; ``32, 349``, ``0,180`` and
    ``1,234,56`` are not.

    >>> read_rational(r"-\\frac{1}{2^{3}}").value
    Fraction(-1, 8)
    """
    if len(text) > _MAX_LENGTH:
        return None
    text = _BLANKS.sub(lambda blank: "\n" if "\n" in blank[0] else " ", tightened(text).strip())
    text = _NOISE.sub("", text)
    if text.endswith("."):
        text = text[:-1]
    if not text:
        return None
    reader = _RationalReader(text)
    try:
        value = reader.expression()
    except (_NotPlain, ZeroDivisionError):
        return None
    return Rational(value, "." in text) if reader.at == len(text) else None


def same_number(gold: Rational, claim: Rational) -> bool:
    """Return whether two numbers are equal.

    Integers and fractions must be equal exactly. If one number is a decimal, they may differ by 1e-6·min(1, size of
    the larger). So 0.333333 equals 1/3, and 1.7e-19 does not equal 1.6e-19; with an absolute tolerance it would.
    """
    if gold.value == claim.value:
        return True
    if not (gold.is_decimal or claim.is_decimal):
        return False
    size = max(abs(gold.value), abs(claim.value))
    return abs(gold.value - claim.value) <= Fraction(1, 10**6) * min(Fraction(1), size)


class _NotPlain(Exception):  # noqa: N818 (never leaves this file)
    pass


class _RationalReader:
    """A recursive-descent parser of one short string."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.depth = text, 0, 0

    def _take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        match = pattern.match(self.text, self.at)
        if match is not None:
            self.at = match.end()
        return match

    def _next(self) -> str:
        return self.text[self.at : self.at + 1]

    def expression(self) -> Fraction:
        sign = -1 if self._next() == "-" else 1
        self.at += self._next() in ("-", "+")
        value = self._factor()
        while operator := self._take(_OPERATOR):
            factor = self._factor()
            value = value / factor if operator[0] in ("/", "\\div", "÷") else value * factor
        return sign * value

    def _group(self, closing: str) -> Fraction:
        self.at += 1
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise _NotPlain
        value = self.expression()
        if self._next() != closing:
            raise _NotPlain
        self.at += 1
        self.depth -= 1
        return value

    def _factor(self) -> Fraction:
        if self._take(_FRAC):
            numerator = self._fraction_part()
            return numerator / self._fraction_part()
        base = self._base()
        power = self._take(_POWER)
        if power is None:
            return base
        exponent = int(power[1] or power[2])
        bits = max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent)
        if bits > _MAX_BITS:
            raise _NotPlain
        return base**exponent

    def _fraction_part(self) -> Fraction:
        if self._next() != "{":
            raise _NotPlain
        return self._group("}")

    def _base(self) -> Fraction:
        closing = {"(": ")", "{": "}"}.get(self._next())
        base = self._number() if closing is None else self._group(closing)
        if self._next() == "!":
            self.at += 1
            if base.denominator != 1 or not 0 <= base <= _MAX_FACTORIAL or self._next() == "!":
                raise _NotPlain
            base = Fraction(math.factorial(int(base)))
        return base

    def _number(self) -> Fraction:
        match = self._take(_NUMBER)
        if match is None or not (match["whole"] or match["decimals"]):
            raise _NotPlain
        whole = re.sub(r"[,\x04 ]", "", match["whole"]) or "0"
        mantissa = Fraction(whole + (match["decimals"] or ""))
        return mantissa * Fraction(10) ** int(match["exponent"] or 0)
