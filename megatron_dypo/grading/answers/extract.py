"""Find where a response states its final answer. Every function takes time linear in the length of the text."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_dypo.config.grading import Thinking
from megatron_dypo.grading.answers.style import AUTO, AnswerStyle

# `\\{` is a line break, then a brace; `\{` is one character. Two backslashes before "boxed" come from double escaping.
_BRACES = re.compile(r"(?P<box>\\(?:boxed|fbox)\s{0,99}\{)|\\\\(?!boxed|fbox)|\\[{}]|(?P<brace>[{}])")
_THINKING = re.compile(r"<(/?)[ \t]{0,9}(think|thinking|thought|reasoning)[ \t]{0,9}>", re.IGNORECASE)
_TAG = re.compile(r"<(/?)[ \t]{0,9}answer[ \t]{0,9}>", re.IGNORECASE)
_HASHES = re.compile(r"####[ \t]{0,99}(\S[^\n]*)")
_NUMBER_FIRST = re.compile(r"[\s$€£+\-−.\\({\[]{0,9}\d")
_END_TOKEN = re.compile(r"(?:<\|[^<>|]{1,40}\|>|<｜[^<>｜]{1,40}｜>|</s>)\Z")
_BETWEEN_BOXES = re.compile(r"[,;]?(?:and|or|\\text\{(?:and|or)\})?|&", re.IGNORECASE)
_MAX_BETWEEN = 40
_VERB = r"(?:is|are|was|would[ ]be|should[ ]be|must[ ]be)\b[ \t]{0,9}:?|是[ ]?:?|为[ ]?:?|[:=：]"
_NOUN = r"\banswers?(?:[ ](?:choice|option))?[*_`]{0,3}|答案"
_ANSWER = re.compile(rf"(?:{_NOUN})[ \t]{{0,9}}(?:{_VERB})", re.IGNORECASE)
_FINAL_ANSWER = re.compile(
    rf"(?:\bfinal[ \t]{{1,9}}answers?[*_`]{{0,3}}|最终答案)[ \t]{{0,9}}(?:{_VERB}|-|(?=[*_ \t]{{0,9}}\n))",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|\Z|\*)|。")


@dataclass(frozen=True, kw_only=True)
class Box:
    """A closed ``\\boxed{…}``, which is ``text[start:end]``, and its content."""

    start: int
    end: int
    content: str


def boxes(text: str) -> list[Box]:
    """Return each ``\\boxed{…}`` and ``\\fbox{…}`` of ``text`` whose braces are balanced, in the order of opening."""
    open_braces: list[tuple[int, int] | None] = []
    found = []
    for match in _BRACES.finditer(text):
        if match["box"]:
            open_braces.append(match.span())
        elif match["brace"] == "{":
            open_braces.append(None)
        elif match["brace"] and open_braces and (box := open_braces.pop()) is not None:
            found.append((box[0], box[1], match.start()))
    return [Box(start=a, end=c + 1, content=text[b:c].strip()) for a, b, c in sorted(found)]


def last_boxed(text: str) -> str | None:
    """Return the content of the last ``\\boxed{…}`` whose braces are balanced; None if there is none.

    >>> last_boxed(r"\\boxed{1} or rather \\boxed{\\frac{1}{2}}")
    '\\\\frac{1}{2}'
    """
    found = boxes(text)
    return found[-1].content if found else None


def boxed_answer(text: str) -> str | None:
    """Return the answer in the last box; boxes joined by a comma, "and" or "or" are one list. None without a box.

    >>> boxed_answer(r"$\\boxed{1}$ and $\\boxed{2}$")
    '1, 2'
    """
    found = boxes(text)
    return _last_statement(text, found)[1] if found else None


def _last_statement(text: str, found: list[Box]) -> tuple[int, str]:
    """Return (start, content) of the last box together with the boxes that are joined to it."""
    joined = [found[-1]]
    for box in reversed(found[:-1]):
        if not _is_joined(text[box.end : joined[-1].start] if box.end <= joined[-1].start else None):
            break
        joined.append(box)
    contents = list(dict.fromkeys(box.content for box in reversed(joined)))
    return joined[-1].start, ", ".join(contents)


def _is_joined(between: str | None) -> bool:
    if between is None or len(between) > _MAX_BETWEEN:
        return False
    bare = re.sub(r"\s|\$|\\[()\[\],;:! ]|\\q?quad(?![A-Za-z])", "", between)
    return _BETWEEN_BOXES.fullmatch(bare) is not None and (bool(bare) or "\n" not in between)


def after_thinking(text: str, thinking: Thinking) -> str | None:
    """Return the part of ``text`` that may state an answer under the rule ``thinking``; None if no part may.

    The tags ``<think>``, ``<thinking>``, ``<thought>`` and ``<reasoning>``, in upper or lower case, enclose thinking.
    """
    if thinking == "anywhere":
        return text
    still_open: set[str] = set()
    start = None
    for match in _THINKING.finditer(text):
        if match[1]:
            still_open.discard(match[2].lower())
            start = match.end()
        else:
            still_open.add(match[2].lower())
    if still_open or (start is None and thinking == "required"):
        return None
    return text[start or 0 :]


def without_end_tokens(text: str) -> str:
    """Return ``text`` without the white space and the special tokens (``<|im_end|>``, ``</s>``) at its end."""
    end = len(text.rstrip())
    while token := _END_TOKEN.search(text, max(0, end - 50), end):
        end = token.start()
        while end and text[end - 1].isspace():
            end -= 1
    return text[:end]


def marked_answer(response: str, style: AnswerStyle = AUTO) -> str | None:
    """Return the answer that ``response`` marks in the format of ``style``; None if it marks none.

    ``auto`` takes the last box or ``<answer>`` pair. Without either it takes the last ``####``, if a number follows it
    or it is on the last line; any other ``####`` is a Markdown heading.
    """
    if style.answer_format == "r1_zero":
        return _r1_zero(response)
    text = after_thinking(response, style.thinking)
    if text is None:
        return None
    if style.answer_format == "boxed":
        return boxed_answer(text)
    if style.answer_format == "answer_tag":
        return _tagged(text)[1]
    if style.answer_format == "final_answer":
        return last_phrase(text, _FINAL_ANSWER)
    if style.answer_format == "gsm8k":
        return _after_hashes(text)
    return _auto(text)


def _auto(text: str) -> str | None:
    tag_end, tagged = _tagged(text)
    found = boxes(text)
    if found and found[-1].start >= tag_end:
        return _last_statement(text, found)[1]
    if tagged is not None:
        return tagged
    lines = list(_HASHES.finditer(text))
    if not lines:
        return None
    last = lines[-1]
    is_final_line = last.end() == len(without_end_tokens(text))
    return last[1].strip() if is_final_line or _NUMBER_FIRST.match(last[1]) else None


def _after_hashes(text: str) -> str | None:
    lines = _HASHES.findall(text)
    return without_end_tokens(lines[-1]).strip() if lines else None


def _tagged(text: str) -> tuple[int, str | None]:
    """Return (end, content) of the last ``<answer>…</answer>``. If a box is inside, the content is that of the box."""
    content, start, end = None, None, 0
    for match in _TAG.finditer(text):
        if not match[1]:
            start = match.end()
        elif start is not None:
            content, start, end = (start, match.start()), None, match.end()
    if content is None:
        return 0, None
    inside = text[content[0] : content[1]]
    boxed = boxed_answer(inside)
    return end, inside.strip() if boxed is None else boxed


def _r1_zero(response: str) -> str | None:
    """Return the answer of ``<think>…</think> <answer>…</answer>``; the prompt may have opened ``<think>``."""
    text = without_end_tokens(response)
    head, closing, tail = text.partition("</think>")
    thought = head.strip().removeprefix("<think>")
    tail = tail.strip()
    if not closing or not tail.startswith("<answer>") or not tail.endswith("</answer>"):
        return None
    content = tail[len("<answer>") : -len("</answer>")]
    if any(tag.search(part) for tag in (_THINKING, _TAG) for part in (thought, content)):
        return None
    return _tagged(tail)[1]


def last_phrase(text: str, *patterns: re.Pattern[str], whole_line: bool = False) -> str | None:
    """Return the statement after the last "(final) answer is", "answer:" or "answer =" of ``text``.

    It ends with its sentence, or with its line if ``whole_line``. If nothing follows the phrase on its line, it is the
    next line that is not blank. Without such a phrase return None.
    """
    found = [match for pattern in patterns or (_ANSWER, _FINAL_ANSWER) for match in pattern.finditer(text)]
    if not found:
        return None
    following = text[max(match.end() for match in found) :].lstrip(" \t*_\n\r")
    rest = following.partition("\n")[0].rstrip(" \t*_")
    boxed = boxed_answer(rest)
    if boxed is not None:
        return boxed
    end = None if whole_line else _SENTENCE_END.search(rest)
    return without_end_tokens(rest[: end.start()] if end else rest).strip(" \t*_")


def gold_text(answer: str) -> str:
    """Return the answer that a data set's ``answer`` field states.

    It is the first of these that the field has: its last box (joined boxes are a list), its ``<answer>`` pair, the text
    after ``####`` in its last line (GSM8K's raw field), the whole field. Raises ValueError if it is blank.
    """
    text = boxed_answer(answer)
    if text is None:
        text = _tagged(answer)[1]
    if text is None:
        hashes = list(_HASHES.finditer(answer))
        text = hashes[-1][1] if hashes and hashes[-1].end() == len(answer.rstrip()) else answer
    if not text.strip():
        raise ValueError(f"answer={answer!r}: must not be blank")
    return text.strip()
