"""Plain numbers in LaTeX or in text, read and compared exactly."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_NUMBER = re.compile(r"(?P<whole>\d{1,3}(?:,\d{3})+|\d*)(?P<decimals>\.\d+)?(?:[eE](?P<exponent>[+-]?\d{1,4}))?")
_POWER = re.compile(r"\^(?:\{([+-]?\d{1,6})\}|([+-]?\d{1,6}))")
_FRAC = re.compile(r"\\[dt]?frac")
_OPERATOR = re.compile(r"/|\\times|\\cdot|\\div|\*|×|÷|·")
_NOISE = re.compile(r"(?<!\d)\s+|\s+(?!\d)|\\[,;:! ]|\\left|\\right|\\?\$|~")
"""What may stand in a number without changing it; a space between two digits would."""
_MAX_LENGTH = 400
_MAX_BITS = 100_000


@dataclass(frozen=True)
class Rational:
    """A number and how it was written."""

    value: Fraction
    is_decimal: bool
    """It has a decimal point, so that it may be a rounded value."""


def read_rational(text: str) -> Rational | None:
    """The number that ``text`` is, exactly; None if it is anything but a plain rational.

    Plain: an integer (thousands commas allowed), a decimal, ``1.5e-7``, a quotient ``a/b`` or ``\\frac{a}{b}``, an
    integer power, and products of these (``1.6 \\times 10^{-19}``), with a sign in front.

    >>> read_rational(r"-\\frac{1}{2^{3}}").value
    Fraction(-1, 8)
    """
    text = _NOISE.sub("", text.replace("{,}", ",").replace("−", "-"))
    if text.endswith("."):
        text = text[:-1]
    if not text or len(text) > _MAX_LENGTH:
        return None
    reader = _RationalReader(text)
    try:
        value = reader.expression()
    except (_NotPlain, ZeroDivisionError):
        return None
    return Rational(value, "." in text) if reader.at == len(text) else None


def same_number(gold: Rational, claim: Rational) -> bool:
    """Equality: exact between integers and fractions; where one is a decimal, up to 1e-6·min(1, size of the larger).

    So 0.333333 is 1/3, but 1.7e-19 is not 1.6e-19, as it is under a tolerance that is only absolute.
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
    """Recursive descent over one short string."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def _take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        match = pattern.match(self.text, self.at)
        if match is not None:
            self.at = match.end()
        return match

    def _expect(self, character: str) -> None:
        if self.text[self.at : self.at + 1] != character:
            raise _NotPlain
        self.at += 1

    def expression(self) -> Fraction:
        sign = -1 if self.text[self.at : self.at + 1] == "-" else 1
        self.at += self.text[self.at : self.at + 1] in ("-", "+")
        value = self._factor()
        while operator := self._take(_OPERATOR):
            factor = self._factor()
            value = value / factor if operator[0] in ("/", "\\div", "÷") else value * factor
        return sign * value

    def _factor(self) -> Fraction:
        if self._take(_FRAC):
            self._expect("{")
            numerator = self.expression()
            self._expect("}")
            self._expect("{")
            denominator = self.expression()
            self._expect("}")
            return numerator / denominator
        base = self._number()
        power = self._take(_POWER)
        if power is None:
            return base
        exponent = int(power[1] or power[2])
        bits = max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent)
        if bits > _MAX_BITS:
            raise _NotPlain
        return base**exponent

    def _number(self) -> Fraction:
        match = self._take(_NUMBER)
        if match is None or not (match["whole"] or match["decimals"]):
            raise _NotPlain
        mantissa = Fraction((match["whole"] or "0").replace(",", "") + (match["decimals"] or ""))
        return mantissa * Fraction(10) ** int(match["exponent"] or 0)
