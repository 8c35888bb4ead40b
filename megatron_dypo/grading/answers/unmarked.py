"""The answer of a response that marks none: its last "answer is …", else its last formula or number."""

from __future__ import annotations

import re

from megatron_dypo.grading.answers.cleaning import cleaned
from megatron_dypo.grading.answers.extract import after_thinking, last_phrase, marked_answer
from megatron_dypo.grading.answers.reading import Quantity, Words, read_answer
from megatron_dypo.grading.answers.style import AUTO, AnswerStyle

_TAIL_CHARACTERS = 4000
"""A response that marks no answer is looked at in its end only."""
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
    """Return the answer of a mathematical response: the one that it marks (see
    :func:`megatron_dypo.grading.answers.extract.marked_answer`), else, in format ``auto`` only, what
    :func:`unmarked_answer` finds; None where it states none.
    """
    claim = marked_answer(response, style)
    if claim is not None and style.answer_format == "final_answer":
        return statement(claim)
    if claim is None and style.answer_format == "auto":
        text = after_thinking(response, style.thinking)
        return None if text is None else unmarked_answer(text, gold)
    return claim


def unmarked_answer(text: str, gold: str) -> str | None:
    """The answer that ``text`` states without a mark; None if it states none.

    It is what follows the last "answer is" or "answer:", up to the end of the sentence or its "because". A sentence
    of words alone ("the answer is clear") counts only where ``gold`` is words. Else it is the last ``$formula$`` or
    number in the last 4,000 characters; a number that is a part of something ("2x + 3", "12 or 13") is none.
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
    """The end of ``text``, from the start of a line where there is one: half a ``$formula$`` would pair wrongly."""
    tail = text[-_TAIL_CHARACTERS:]
    return tail.partition("\n")[2] if len(tail) < len(text) and "\n" in tail.rstrip() else tail


def statement(phrase: str) -> str:
    """Return ``phrase`` without its reason.

    Of "the largest n is 34" that is what the one "is" states; of a formula that only words follow, the formula.
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
    """Return the last ``$formula$`` or number of ``text``; None if it has none, or if that is a part of something."""
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
    """The number as it is written; None if it is a part of a formula or of a list."""
    before = _just_before(text, number).rstrip("$€£\\")
    after = text[number.end() : number.end() + 40]
    if _BEFORE.search(before) or _AFTER.match(after) or (number[0][0] in "-−" and _BEFORE_MINUS.search(before)):
        return None
    return number[0]
