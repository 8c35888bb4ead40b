"""Find the answer of a response that marks none: its last "answer is …", else its last formula or number."""

from __future__ import annotations

import re

from megatron_dypo.grading.answers.cleaning import cleaned
from megatron_dypo.grading.answers.extract import after_thinking, last_phrase, marked_answer
from megatron_dypo.grading.answers.reading import Quantity, Words, read_answer
from megatron_dypo.grading.answers.style import AUTO, AnswerStyle

_TAIL_CHARACTERS = 4000
"""Characters at the end of a response in which an unmarked answer is looked for."""
_SHORT = 200
_ARITHMETIC = re.compile(r"[ \d.,+*/×÷^()=-]*\d[ .)]*")
_IS = re.compile(r"\b(?:is|are|equals)\b")
_ANNOTATION = re.compile(r"<<[^<>\n]{0,200}>>")
_MATH = re.compile(
    r"\$\$([^$]{1,400})\$\$|\$((?:[^$\n\\]|\\.){1,400})\$|\\\((.{1,400}?)\\\)|\\\[(.{1,400}?)\\\]", re.DOTALL
)
_NUMBER = re.compile(
    r"[-−]?(?:[1-9]\d{0,2}(?:(?:,\d{3})+|(?: \d{3})+)(?!\d|[, ]\d)|\d+)?(?:\.\d+)?(?<=\d)"
    r"(?:[eE][-+]?\d{1,4})?(?:/\d+)?\\?%?"
)
_BEFORE = re.compile(
    r"(?:[\w^_+*/×÷√(\[{<>≤≥≠.\\−-]|\d:)\Z"  # touches the number
    r"|(?:[+*/×÷^<>≤≥≠=]\s?[-−]|[+*/×÷^<>≤≥≠]|[\w)}]\s?[-−]"
    r"|\d[ ]?[,;]?|\b(?:or|and|not|than|plus|minus|times|over)|n't)[ ]*\Z"
)
_BEFORE_MINUS = re.compile(r"(?:\b\w|[)}\d])\s?\Z")
_BEFORE_FORMULA = re.compile(r"(?:\b(?:or|and|not|than)|n't|[$\d][ ]?[,;])\s*\Z")
_AFTER = re.compile(
    r"(?!(?:mm|cm|km|m|in|ft)[²³])[\w^_(\[{:]|\s?[+*×÷=<>≤≥≠!]|\s?[-−/]\s?\w|\s?(?:or|and)\s[-−$]?\d|,\d|[.,]\s?\d"
)
_REASON = re.compile(r",?\s(?:because|since|which|as|so|for)\b|,\s(?:not|rather)\b", re.IGNORECASE)


def claimed_answer(response: str, gold: str, style: AnswerStyle = AUTO) -> str | None:
    """Return the answer of a mathematical response; None if it states none.

    It is the answer that the response marks (:func:`megatron_dypo.grading.answers.extract.marked_answer`). If it marks
    none and the format is ``auto``, it is the one that :func:`unmarked_answer` finds.
    """
    claim = marked_answer(response, style)
    if claim is not None and style.answer_format == "final_answer":
        return statement(claim)
    if claim is None and style.answer_format == "auto":
        text = after_thinking(response, style.thinking)
        return None if text is None else unmarked_answer(text, gold)
    return claim


def unmarked_answer(text: str, gold: str) -> str | None:
    """Return the answer that ``text`` states without a mark; None if it states none.

    Only the last 4,000 characters are read. The answer is the text after the last "answer is" or "answer:", up to the
    end of the sentence or its "because". If that is only words ("the answer is clear"), it counts only if ``gold`` is
    words too. Else the answer is the last ``$formula$`` or number; a number that is part of a larger expression
    ("2x + 3", "12 or 13") does not count.
    """
    text = _ANNOTATION.sub("", _tail(text)).replace("**", "")
    if len(text) <= _SHORT and (_ARITHMETIC.fullmatch(text) or isinstance(read_answer(cleaned(text)), Quantity)):
        return text
    phrase = last_phrase(text)
    if phrase is not None:
        phrase = statement(phrase)
        read = read_answer(cleaned(phrase))
        if not isinstance(read, Words) or isinstance(read_answer(cleaned(gold)), Words):
            return phrase
    return last_value(text)


def _tail(text: str) -> str:
    """Return the end of ``text``, if possible from the start of a line: the ``$`` of half a formula would mislead."""
    tail = text[-_TAIL_CHARACTERS:]
    return tail.partition("\n")[2] if len(tail) < len(text) and "\n" in tail.rstrip() else tail


def statement(phrase: str) -> str:
    """Return what ``phrase`` states, without its reason.

    If it has one "is" ("the largest n is 34"), return the part after it. If it is a formula followed only by words,
    drop the formula's dollar signs.
    """
    reason = _REASON.search(phrase)
    if reason is not None and reason.start() > 0:
        phrase = phrase[: reason.start()]
    subject, *stated = _IS.split(phrase)
    if len(stated) == 1 and not re.search(r"\d|\b(?:and|or)\b", subject):
        phrase = stated[0].strip()
    formula = _MATH.match(phrase)
    if formula is not None and not re.search(r"[\d\\$]|\b(?:and|or)\b", phrase[formula.end() :]):
        return _inside(formula) + phrase[formula.end() :]
    return phrase


def _inside(formula: re.Match[str]) -> str:
    return next(group for group in formula.groups() if group is not None)


def last_value(text: str) -> str | None:
    """Return the last ``$formula$`` or number of ``text``; None if it has none, or only part of an expression."""
    formulas = list(_MATH.finditer(text))
    behind = formulas[-1].end() if formulas else 0
    numbers = [match for match in _NUMBER.finditer(text, behind) if match[0]]
    if numbers:
        return _whole_number(text, numbers[-1])
    if not formulas or _BEFORE_FORMULA.search(_just_before(text, formulas[-1])):
        return None
    return _inside(formulas[-1])


def _just_before(text: str, match: re.Match[str]) -> str:
    return text[max(0, match.start() - 40) : match.start()]


def _whole_number(text: str, number: re.Match[str]) -> str | None:
    """Return the number as the text writes it; None if it is part of a formula or of a list."""
    before = _just_before(text, number).rstrip("$€£\\")
    after = text[number.end() : number.end() + 40]
    if _BEFORE.search(before) or _AFTER.match(after) or (number[0][0] in "-−" and _BEFORE_MINUS.search(before)):
        return None
    return number[0]
