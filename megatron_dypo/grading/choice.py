"""Verify multiple choice: find the option that a response settles on."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from megatron_dypo.grading.answers.extract import after_thinking, gold_text, marked_answer, without_end_tokens
from megatron_dypo.grading.answers.style import AUTO, AnswerStyle

_FORM = re.compile(r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mbox)\s?\{([^{}]{0,999})\}|\\(?:bf|rm|[ ,;:!])")
_GOLD = re.compile(r"[\s(\[]*([A-Ja-j1-9])[\s)\].:]*")
_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore),?\s)?(?:the\s)?(?:(?:correct|final|right|best)\s)?"
    r"(?:option|choice|answer|letter)(?:\s(?:option|choice|letter))?(?:\sis\b)?\s?:?\s?",
    re.IGNORECASE,
)
_STATED = re.compile(
    r"\b(?:answer|option|choice)s?(?:\s{1,5}(?:option|choice|letter)\b)?[*_]{0,3}"
    r"(?:\s{1,5}(?:is|would\s{1,5}be|should\s{1,5}be|must\s{1,5}be)\b)?\s{0,5}[:-]?(?:\s{0,5}(?:option|choice)\b)?"
    r"|(?:答案|回答|解答)\s?[是为為选選]?|[选選][项項择擇]?",
    re.IGNORECASE,
)
_DECORATION = re.compile(r"[\s:*$_\"'“]{0,20}")


@dataclass(frozen=True, kw_only=True)
class _Labels:
    """Patterns for the labels of a question's options."""

    label: re.Pattern[str]
    """One label in running text."""
    whole: re.Pattern[str]
    """A label at the start of a box."""
    more: re.Pattern[str]
    """A second label behind the first: a text with both settles on no option."""
    line: re.Pattern[str]
    """A line that is a label, or begins with one; the rest of the line is the group ``rest``."""


def _labels(one: str, lone: str, rest_of_line: str) -> _Labels:
    bracketed = rf"(?:[(\[]\s{{0,3}}{one}\s{{0,3}}[)\]]|<<{one}>>)"
    # A small letter outside brackets is a label only between a colon and the end of its line.
    small = rf"(?<=:)\s?{one}(?=[.)]?\s{{0,9}}(?:\n|\Z))"
    label = rf"(?:{bracketed}|{lone}|{small})"
    return _Labels(
        label=re.compile(label),
        whole=re.compile(rf"({bracketed}|{one}(?=[).:\]]|\s*\Z)|{lone})(?!\s?[=+*/^_<>|])"),
        more=re.compile(
            rf"[\s)\]}}*.]{{0,5}}(?:[,/&;、]|\b(?:and|or)\b|[和或])"
            rf"\s{{0,5}}(?:(?:and|or|option|choice)\s{{1,5}}){{0,2}}[(\[]?{one}(?![\w'’])"
        ),
        line=re.compile(
            rf"^[ \t*$]{{0,9}}(?:(?P<bracketed>{bracketed})(?P<text>[^\n]*)|(?P<lone>{lone}){rest_of_line})$",
            re.MULTILINE,
        ),
    )


# A label is a lone capital. "A" and "I" before a lower-case word are English ("is A mystery", "the answer, I think").
_LETTERS = _labels(
    "[A-Ja-j]",
    r"(?:[B-HJ]|[AI](?!\s+(?!because\b|since\b|as\b|and\b|or\b|for\b)[a-z]))(?![\w'’^=+*<>{\\]|-\w)",
    r"[ \t*$]{0,9}(?P<rest>[.):,][^\n]*)?",
)
# "3 m/s" and "3.5" are answers, not labels; "3. Then" is a step.
_DIGITS = _labels(
    "[1-9]", r"[1-9](?![\w'’^=+*/<>{\\%-]|[.,:]\d|\s?[=+*/^<>×÷%-]|\s+[a-z])", r"[ \t*$]{0,9}(?P<rest>)[).]?"
)


def verify_choice(response: str, answer: str, style: AnswerStyle = AUTO) -> bool:
    """Return whether ``response`` settles on the option that ``answer`` names (``B``, ``(B)``, ``b.``, or a digit).

    Raises ValueError if ``answer`` is not one letter A to J or one digit 1 to 9.
    """
    gold = gold_label(answer)
    return chosen_label(response, gold, style) == gold


def gold_label(answer: str) -> str:
    """Return the label of a gold answer. Raises ValueError if it is not one letter A to J or one digit 1 to 9."""
    gold = _GOLD.fullmatch(gold_text(answer))
    if gold is None:
        raise ValueError(f"answer={answer!r}: must be one letter from A to J, or one digit from 1 to 9")
    return gold[1].upper()


def chosen_label(response: str, gold: str, style: AnswerStyle = AUTO) -> str | None:
    """Return the option that ``response`` settles on: a digit if ``gold`` is one, else a letter; None: no option."""
    return _chosen(response, style, _DIGITS if gold.isdigit() else _LETTERS)


def chosen_letter(response: str, style: AnswerStyle = AUTO) -> str | None:
    """Return the letter A–J that ``response`` chooses; None if it chooses none.

    It is the letter in the last ``\\boxed{B}`` or ``<answer>B</answer>``. If no letter is there, it is that of the last
    "answer is (B)", "Answer: B", "option B" or ``答案：B``. Without such a phrase and without a box or tag, it is that
    of the last line that is a lone letter or begins with one ("B", "(B)", "B. Paris"). Two letters ("A or B",
    ``\\boxed{A, B}``) are no choice.
    """
    return _chosen(response, style, _LETTERS)


def _chosen(response: str, style: AnswerStyle, labels: _Labels) -> str | None:
    """Return the chosen letter or digit; see :func:`chosen_letter`."""
    marked = marked_answer(response, style)
    if marked is not None:
        plain = _plain(marked)
        settled = _settled_at_start(plain, labels)
        if settled is None:
            settled = _last_stated(plain, labels)
        if settled is not None:
            return settled or None
    text = after_thinking(response, style.thinking) if style.answer_format == "auto" else None
    if text is None:
        return None
    text = _plain(text)
    settled = _last_stated(text, labels)
    if settled is None and marked is None:
        settled = _last_line(text, labels)
    return settled or None


def _plain(text: str) -> str:
    """Return ``text`` with half-width letters and without font commands and end tokens."""
    text = unicodedata.normalize("NFKC", without_end_tokens(text))
    return _FORM.sub(lambda match: match[1] or " ", text.replace("**", ""))


def _name(label: str) -> str:
    return label.strip("()[]<> \n").upper()


def _settled_at_start(text: str, labels: _Labels) -> str | None:
    """Return the label at the start of ``text``; empty if two labels are there; None if none is."""
    text = text.strip(" \t\r\n*$")
    lead = _LEAD.match(text)
    text = text[lead.end() :].strip(" *$") if lead is not None else text
    match = labels.whole.match(text)
    if match is None:
        return None
    return "" if labels.more.match(text, match.end()) else _name(match[1])


def _last_stated(text: str, labels: _Labels) -> str | None:
    """Return the label of the last "answer is B"; empty and None are as in :func:`_settled_at_start`."""
    settled = None
    for statement in _STATED.finditer(text):
        start = _DECORATION.match(text, statement.end())
        match = labels.label.match(text, statement.end()) or labels.label.match(text, start.end() if start else 0)
        if match is not None:
            settled = "" if labels.more.match(text, match.end()) else _name(match[0])
    return settled


def _last_line(text: str, labels: _Labels) -> str | None:
    found = list(labels.line.finditer(text.rstrip()))
    if not found:
        return None
    last = found[-1]
    if any(labels.more.match(text, match.end("bracketed" if match["bracketed"] else "lone")) for match in found):
        return ""
    names = [_name(match["bracketed"] or match["lone"]) for match in found]
    is_alone = not (last["text"] or last["rest"] or "").strip(" .):,*$")
    if is_alone and last.end() == len(text.rstrip()):
        return names[-1]
    return names[0] if len(set(names)) == 1 else ""
