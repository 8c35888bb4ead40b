"""Exact match of the final answer, as a string."""

from __future__ import annotations

import re
import unicodedata

from megatron_dypo.grading.answers.extract import (
    after_thinking,
    gold_text,
    last_phrase,
    marked_answer,
    without_end_tokens,
)
from megatron_dypo.grading.answers.style import AUTO, AnswerStyle

_DECIMAL = re.compile(r"([+-]?)(\d*)\.(\d+)")
_ALL_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s?\{([^{}]*)\}")


def verify_exact(response: str, answer: str, style: AnswerStyle = AUTO) -> bool:
    """True if the stated answer of ``response`` equals ``answer`` after normalisation.

    The stated answer is the one that the response marks (see
    :func:`megatron_dypo.grading.answers.extract.marked_answer`); without a mark, and in format ``auto`` only, what
    follows the last "answer is" or "answer:" in its sentence or its line; without one, the last line that is not blank.
    Normalisation: Unicode NFKC, case folded, runs of white space are one space, ``\\text{…}`` around the whole, quotes,
    ``$``, ``*`` and ``.,;:!`` around the answer are left out, and a decimal loses the zeros at its end (27.0 is 27).
    Raises ValueError if ``answer`` is blank.
    """
    gold = normalized(gold_text(answer))
    return gold in (normalized(claim) for claim in stated_answers(response, style))


def stated_answers(response: str, style: AnswerStyle = AUTO) -> list[str]:
    """The readings of the part of ``response`` that states its answer: one, or none for a response that states none.

    After "answer is" there are two: the rest of the line, and of the sentence ("The answer is Paris. It lies …").
    """
    marked = marked_answer(response, style)
    if marked is not None:
        return [marked] if marked.strip() else []
    text = after_thinking(response, style.thinking) if style.answer_format == "auto" else None
    if text is None:
        return []
    text = without_end_tokens(text)
    phrase = last_phrase(text)
    if phrase is not None:
        line = last_phrase(text, whole_line=True)
        return [one for one in (line, phrase) if one]
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1:]


def normalized(text: str) -> str:
    """``text`` in the form in which answers are compared."""
    text = text.strip(" \t\r\n$*").rstrip(".")
    whole = _ALL_TEXT.fullmatch(text)
    text = unicodedata.normalize("NFKC", whole[1] if whole else text)
    text = " ".join(text.casefold().split())
    decimal = _DECIMAL.fullmatch(text.strip(" ,;:!\"'`“”‘’$*"))
    if decimal is not None:
        return _canonical(*decimal.groups())
    return text.strip(" .,;:!\"'`“”‘’$*")


def _canonical(sign: str, whole: str, decimals: str) -> str:
    """A decimal without the zeros that say nothing."""
    decimals = decimals.rstrip("0")
    text = (whole or "0") + ("." + decimals if decimals else "")
    return text if sign != "-" or not text.strip("0.") else "-" + text
