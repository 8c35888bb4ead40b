"""Read the unit behind a number: decide whether its words are a unit, and of which size."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_dypo.grading.answers.cleaning import WORD

_SIZES: dict[str, dict[str, Fraction]] = {
    "length": {
        "mm millimeter millimeters millimetre millimetres": Fraction(1, 1000),
        "cm centimeter centimeters centimetre centimetres": Fraction(1, 100),
        "m meter meters metre metres": Fraction(1),
        "km kilometer kilometers kilometre kilometres": Fraction(1000),
        "in inch inches": Fraction(254, 10000),
        "ft foot feet": Fraction(3048, 10000),
        "yd yard yards": Fraction(9144, 10000),
        "mi mile miles": Fraction(1609344, 1000),
    },
    "mass": {
        "mg milligram milligrams": Fraction(1, 1000),
        "g gram grams": Fraction(1),
        "kg kilogram kilograms": Fraction(1000),
        "oz ounce ounces": Fraction(28349523125, 10**9),
        "lb lbs pound pounds": Fraction(45359237, 10**5),
    },
    "time": {
        "s sec secs second seconds": Fraction(1),
        "min mins minute minutes": Fraction(60),
        "h hr hrs hour hours": Fraction(3600),
        "day days": Fraction(86400),
        "week weeks": Fraction(7 * 86400),
    },
    "volume": {
        "ml mL milliliter milliliters millilitre millilitres": Fraction(1, 1000),
        "l L liter liters litre litres": Fraction(1),
    },
    "money": {"cent cents": Fraction(1, 100), "dollar dollars USD": Fraction(1)},
    "angle": {"degree degrees deg": Fraction(1)},
}
_KNOWN = {
    name: (dimension, size)
    for dimension, sizes in _SIZES.items()
    for names, size in sizes.items()
    for name in names.split()
}
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_MORE_SYMBOLS_TEXT = """
mph kph rpm Hz kHz kW kWh mA kJ kN Pa kPa atm mol pm am AM PM units unit ohm
"""
_MORE_SYMBOLS = frozenset(_MORE_SYMBOLS_TEXT.split())
_NO_UNIT_TEXT = """
a an and or not no is are to than then less more plus minus times divided by over point half halves third thirds
quarter quarters fourth fourths fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths tenth
tenths hundredth hundredths thousandth thousandths dozen dozens mod modulo base choose factorial squared cubed
negative where when if for because since so but with without except between until from at least most about
hundreds thousands millions billions trillions percent percentage pct per cent pi sqrt root sin cos tan cot sec
csc log ln exp lim inf infty infinity max gcd lcm none undefined alpha beta gamma delta epsilon theta lambda
sigma omega phi psi rho tau
"""
_NO_UNIT = frozenset(_NO_UNIT_TEXT.split())
_WORD = rf"\(?{WORD}?[A-Za-zµΩ][A-Za-z'’-]*\.?\)?(?:\^(?:\{{-?\d\}}|-?\d)|[²³])?"
_TAIL = re.compile(
    rf"(?:\s?(?P<percent>%|{WORD}?(?:percent|percentage|pct|per {WORD}?cent)(?![A-Za-z])))?"
    rf"(?P<words>(?:[\s~/·*]{{0,3}}{_WORD}(?:[\s~/·*]{{1,3}}{_WORD})*)?)\s?"
)
_ONE_WORD = re.compile(
    rf"(?P<glue>[\s~/·*(]*)(?P<mark>{WORD}?)(?P<word>[A-Za-zµΩ][A-Za-z'’-]*)\.?\)?(?P<power>[^\s~/·*\x01]*)"
)
_MAX_WORDS = 8


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A unit, written behind a number."""

    is_percent: bool = False
    scale: int = 1
    """1,000,000 for "million"."""
    dimension: str | None = None
    """For example ``length^2``. None: the words are not in the table, and the unit equals any other."""
    size: Fraction = Fraction(1)
    """Size of one unit in the dimension's base unit."""


def read_unit(text: str) -> Unit | None:
    """Return the unit that ``text``, a cleaned text behind a number, names.

    Return None if the text may be anything else: a variable, "or 13". Words in ``\\text{…}`` and words of three or more
    letters are units unless they are known to change the number ("less", "dozen"). Shorter words outside ``\\text{…}``
    are units only if they are in the table.
    """
    match = _TAIL.fullmatch(text)
    if match is None:
        return None
    words = list(_ONE_WORD.finditer(match["words"]))
    if len(words) > _MAX_WORDS:
        return None
    scale = 1
    if words and words[0]["word"] in _SCALES:
        scale = _SCALES[words.pop(0)["word"]]
    if not all(_is_unit(word) for word in words):
        return None
    dimension, size = _known_unit(words)
    return Unit(is_percent=match["percent"] is not None, scale=scale, dimension=dimension, size=size)


def _is_unit(match: re.Match[str]) -> bool:
    word = match["word"]
    if match["mark"]:
        return word.lower() not in _NO_UNIT or (word == "per" and "/" not in match["glue"])
    if word in _KNOWN or word in _MORE_SYMBOLS or word == "per":
        return len(word) > 1 or "/" in match["glue"]
    return len(word) > 2 and match["glue"] != "" and word.lower() not in _NO_UNIT


def _known_unit(words: list[re.Match[str]]) -> tuple[str | None, Fraction]:
    """Return (dimension, size) of a unit such as "cm", "cm^2" or "square feet"; (None, 1) for any other words."""
    power = 1
    if len(words) == 2 and words[0]["word"].lower() in _POWERS:
        power = _POWERS[words.pop(0)["word"].lower()]
    if len(words) != 1 or words[0]["word"] not in _KNOWN:
        return None, Fraction(1)
    written = words[0]["power"].translate(str.maketrans("²³", "23", "^{}"))
    power *= int(written) if written else 1
    dimension, size = _KNOWN[words[0]["word"]]
    return (dimension, size) if power == 1 else (f"{dimension}^{power}", size**power)
