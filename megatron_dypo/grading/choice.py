"""Multiple choice: which letter a response settles on."""

from __future__ import annotations

import re

from megatron_dypo.grading.extract import last_boxed

# A lone capital; "A" and "I" before a lower-case word are English ("the answer is a mystery", "the answer, I think").
_LONE = r"(?:[B-HJ]|[AI](?!\s+(?!because\b|since\b|as\b|and\b|for\b)[a-z]))(?![\w'’])"
_BRACKETED = r"[(\[]\s*[A-Ja-j]\s*[)\]]"
_LETTER = rf"(?:{_BRACKETED}|{_LONE})"
_PREFIX = r"[\s:*$]*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{\s*)?"

_STATED = re.compile(
    rf"(?i:\b(?:answer|option|choice)\b(?:\s+(?:is|would\s+be|should\s+be|must\s+be))?)"
    rf"(?i:\s*:?\s*(?:option|choice)\b)?{_PREFIX}({_LETTER})"
)
_WHOLE = re.compile(r"[\s(\[*$]*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{\s*)?[(\[]?\s*([A-Ja-j])(?![\w'’]).*", re.DOTALL)
_LINE = re.compile(rf"^[\s*$]*({_LETTER})[\s*$]*(?:[.):,][^\n]*)?$", re.MULTILINE)
_GOLD = re.compile(r"[\s(\[]*([A-Za-z])[\s)\].:]*")


def verify_choice(response: str, answer: str) -> bool:
    """True if the letter that ``response`` settles on is that of ``answer`` (``B``, ``(B)``, ``b.``).

    Raises ValueError if ``answer`` is not one letter.
    """
    gold = _GOLD.fullmatch(answer)
    if gold is None:
        raise ValueError(f"answer={answer!r}: must be one letter")
    return chosen_letter(response) == gold[1].upper()


def chosen_letter(response: str) -> str | None:
    """The letter A–J of the last ``\\boxed{B}``; without one, of the last "answer is (B)", "Answer: B", "option B";
    without one, of the last line that is or begins with a letter alone ("B", "(B)", "B. Paris"); else None.
    """
    boxed = last_boxed(response)
    if boxed is not None:
        whole = _WHOLE.fullmatch(boxed)
        return whole[1].upper() if whole else None
    found = _STATED.findall(response) or _LINE.findall(response)
    return found[-1].strip("()[] \n").upper() if found else None
