"""Mathematical equality, by exact fractions where the answers are plain numbers and by math-verify elsewhere.

Imported in verifier processes only: math-verify brings sympy, and some inputs keep it busy for ever.
"""

from __future__ import annotations

import logging

import math_verify

from megatron_dypo.grading.extract import last_boxed, last_marked
from megatron_dypo.grading.rationals import read_rational, same_number

# It warns that its timeouts are off. They are off because they use SIGALRM and raise a BaseException; the deadline
# that counts is the one on this process.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_TAIL_CHARACTERS = 4000
"""Without a mark the answer is looked for in the end of the response only: the search is slow on long texts."""


def verify_math(response: str, answer: str) -> bool:
    """True if ``response`` ends with an answer equal to ``answer``.

    The answer of a response is its last ``\\boxed{…}`` (several boxes are not a set), or what follows its last
    ``####``; without either, what math-verify finds in its end ("the answer is …", then the last number or formula).
    Never returns for inputs such as ``9^{9^{9^9}}``: run it under a deadline.
    """
    gold_text = last_boxed(answer) or answer
    gold_number = read_rational(gold_text)
    claim_text = last_marked(response)
    if claim_text is not None:
        claim_number = read_rational(claim_text)
        if gold_number is not None and claim_number is not None:
            return same_number(gold_number, claim_number)
    claim = _parse(_boxed(claim_text) if claim_text is not None else response[-_TAIL_CHARACTERS:])
    if claim_text is None and gold_number is not None:
        # The parsed list ends with the text that was found.
        found = read_rational(claim[-1]) if claim and isinstance(claim[-1], str) else None
        if found is not None:
            return same_number(gold_number, found)
    return math_verify.verify(_parse(_boxed(gold_text)), claim, timeout_seconds=None)


def _boxed(text: str) -> str:
    # In a box math-verify reads a text as it is, without looking for a formula in it.
    return "\\boxed{" + text + "}"


def _parse(text: str) -> list:
    return math_verify.parse(text, parsing_timeout=None)
