"""Split the text of a list, set, tuple or interval into its members."""

from __future__ import annotations

import re

from megatron_dypo.grading.answers.cleaning import SET_CLOSE, SET_OPEN, WORD

_OPENING = "([{" + SET_OPEN
_CLOSING = ")]}" + SET_CLOSE
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d]|,\d)")
_LEADING_ZERO = re.compile(r"0\d")
_CONJUNCTION = re.compile(rf"(?<![A-Za-z\\])({WORD}?(?:and|or|or else|和|或))(?![A-Za-z])", re.IGNORECASE)
_PLUS_MINUS = re.compile(r"\\pm(?![A-Za-z])|±")
_MAX_LENGTH = 4000
_MAX_GROUPS = 20


def split_list(text: str) -> tuple[str, tuple[str, ...]] | None:
    """Return (brackets, members) of the list in a cleaned text; None if the text is not a list.

    Outside all brackets, a semicolon, "and", "or", or a comma that is not inside a number separates two members.
    ``a \\pm b`` is two members. The brackets are those around the whole text: ``()``, ``(]``, ``[)``, ``[]``, ``{}``
    for a set; empty for none. Round brackets around a single member, and braces without a backslash, only group. A
    number with thousands separators and nothing else in brackets, ``(1,100)``, is an interval or a point.

    >>> split_list("0, 180")
    ('', ('0', '180'))
    >>> split_list("(1,100)")
    ('()', ('1', '100'))
    """
    if len(text) > _MAX_LENGTH:
        return None
    text = ungrouped(text)
    if text and text[0] in _OPENING and _closing_of(text) == len(text) - 1:
        pair, inside = text[0] + text[-1], text[1:-1].strip()
        brackets = "{}" if pair == SET_OPEN + SET_CLOSE else pair
        return brackets, tuple(_with_both_signs(_bracketed(inside))) if inside else ()
    members = _with_both_signs(_members(text))
    return ("", tuple(members)) if len(members) > 1 else None


def ungrouped(text: str) -> str:
    """Remove round brackets around a single member, and braces without a backslash around any text."""
    text = text.strip()
    for _ in range(_MAX_GROUPS):
        if not text or text[0] not in "({" or _closing_of(text) != len(text) - 1:
            break
        inside = text[1:-1].strip()
        if text[0] + text[-1] not in ("()", "{}") or (text[0] == "(" and len(_bracketed(inside)) != 1) or not inside:
            break
        text = inside
    return text


def _closing_of(text: str) -> int:
    """Return the index of the bracket that closes the one at the start of ``text``; -1 if none does."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character in _OPENING) - (character in _CLOSING)
        if depth == 0:
            return index
    return -1


def is_balanced(text: str) -> bool:
    """Return whether every bracket and bar of ``text`` is closed; ``[0,1)`` is closed."""
    depth = 0
    for character in text:
        depth += (character in _OPENING) - (character in _CLOSING)
        if depth < 0:
            return False
    return depth == 0 and text.count("|") % 2 == 0


def _bracketed(text: str) -> list[str]:
    """Return the members of a text in brackets. If each comma could separate thousands, each separates members.

    The exception is a text whose member would begin with a zero, ``(1,000)``: nobody writes a list like that.
    """
    members = _members(text)
    if len(members) == 1:
        every = _members(text, thousands=None)
        members = members if any(_LEADING_ZERO.match(member) for member in every) else every
    return members


def _members(text: str, thousands: re.Pattern[str] | None = _THOUSANDS) -> list[str]:
    numbers = thousands.finditer(text) if thousands else ()
    inside_number = {index for match in numbers for index in range(*match.span())}
    conjunctions = {match.start(): match.end() for match in _CONJUNCTION.finditer(text)}
    members: list[str] = []
    depth, start, index = 0, 0, 0
    while index < len(text):
        character = text[index]
        depth += (character in _OPENING) - (character in _CLOSING)
        end = index
        if depth == 0 and index in conjunctions:
            end = conjunctions[index]
            if members and not text[start:index].strip():  # the comma of "2, 3, and 4" has separated them already
                start = index = end
                continue
        elif depth == 0 and (character == ";" or (character == "," and index not in inside_number)):
            end = index + 1
        if end > index:
            members.append(text[start:index])
            start = end
        index = max(end, index + 1)
    members.append(text[start:])
    return [member.strip() for member in members]


def _with_both_signs(members: list[str]) -> list[str]:
    both = []
    for member in members:
        signs = list(_PLUS_MINUS.finditer(member))
        if len(signs) == 1:
            before, after = member[: signs[0].start()], member[signs[0].end() :]
            both += [f"{before}+{after}".strip(), f"{before}-{after}".strip()]
        else:
            both.append(member)
    return both
