"""The answer that a response states, in a form that majorities can count."""

from __future__ import annotations

from typing import Any

from megatron_dypo.config.grading import BUILT_IN_VERIFIERS
from megatron_dypo.grading.answers.cleaning import MAX_LENGTH, cleaned, literal
from megatron_dypo.grading.answers.extract import gold_text
from megatron_dypo.grading.answers.reading import Quantity, read_answer
from megatron_dypo.grading.answers.style import AUTO, AnswerStyle
from megatron_dypo.grading.answers.unmarked import claimed_answer
from megatron_dypo.grading.choice import chosen_label, gold_label
from megatron_dypo.grading.exact import normalized, stated_answers


def states_answers(verifier: str) -> bool:
    """Return whether stated answers are known. A user's own verifier tells only right or wrong."""
    return verifier in BUILT_IN_VERIFIERS


def stated_answer(verifier: str, response: str, answer: Any, style: AnswerStyle = AUTO) -> str | None:
    """Return the answer of ``response`` as ``verifier`` reads it; None if it states none or the answer is not known.

    Equal texts are equal answers. Equal answers that are written differently may stay different: ``0.5`` and
    ``\\frac{1}{2}`` become equal, but ``(x+1)^2`` and its expansion do not.

    Raises:
        ValueError: the verifier does not accept the gold ``answer``.
    """
    if not states_answers(verifier) or not isinstance(answer, str):
        return None
    if verifier == "choice":
        return chosen_label(response, gold_label(answer), style)
    if verifier == "exact":
        return next((text for text in map(normalized, stated_answers(response, style)) if text), None)
    claim = claimed_answer(response, gold_text(answer), style)
    return None if claim is None else _spelled(claim)


def _spelled(claim: str) -> str | None:
    text = cleaned(claim)
    if not text or len(text) > MAX_LENGTH:
        return text[:MAX_LENGTH] or None
    read = read_answer(text)
    if isinstance(read, Quantity) and read.unit.dimension is None:
        value = read.number.value * read.unit.scale
        if max(value.numerator.bit_length(), value.denominator.bit_length()) < 4000:
            return str(value)
    return literal(text).casefold() or None
