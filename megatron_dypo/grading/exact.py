"""Verify an exact match: compare the final answer as a string."""

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
    """Return whether the stated answer of ``response`` equals ``answer`` after normalisation.

    The stated answer is the one that the response marks (:func:`megatron_dypo.grading.answers.extract.marked_answer`).
    In format ``auto`` a response without a mark states the rest of the sentence, or of the line, after its last "answer
    is" or "answer:"; without such a phrase it states its last line that is not blank. Normalisation applies Unicode
    NFKC, folds case, makes each run of white space one space, removes ``\\text{…}``, quotes, ``$``, ``*`` and ``.,;:!``
    around the answer, and removes the zeros at the end of a decimal (27.0 is 27). Raises ValueError if ``answer`` is
    blank.
    """
    gold = normalized(gold_text(answer))
    return gold in (normalized(claim) for claim in stated_answers(response, style))


def stated_answers(response: str, style: AnswerStyle = AUTO) -> list[str]:
    """Return the readings of the answer that ``response`` states; none if it states none.

    After "answer is" there are two: the rest of the line and the rest of the sentence ("The answer is Paris. It lies
    …"). Otherwise there is one.
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
    """Return ``text`` in the form in which answers are compared."""
    text = text.strip(" \t\r\n$*").rstrip(".")
    whole = _ALL_TEXT.fullmatch(text)
    text = unicodedata.normalize("NFKC", whole[1] if whole else text)
    text = " ".join(text.casefold().split())
    decimal = _DECIMAL.fullmatch(text.strip(" ,;:!\"'`“”‘’$*"))
    if decimal is not None:
        return _canonical(*decimal.groups())
    return text.strip(" .,;:!\"'`“”‘’$*")


def _canonical(sign: str, whole: str, decimals: str) -> str:
    """Return a decimal without the zeros at its end."""
    decimals = decimals.rstrip("0")
    text = (whole or "0") + ("." + decimals if decimals else "")
    return text if sign != "-" or not text.strip("0.") else "-" + text
