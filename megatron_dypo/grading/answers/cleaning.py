"""Clean the text of an answer: remove LaTeX and Markdown that change its looks and not its meaning."""

from __future__ import annotations

import re

from megatron_dypo.grading.answers.rationals import tightened

WORD = "\x01"
"""Mark before each word that was in ``\\text{…}``: it keeps ``5\\text{ m}`` apart from ``5 m``, 5 times a variable."""
SET_OPEN, SET_CLOSE = "\x05", "\x06"
"""Marks for ``\\{`` and ``\\}``."""

_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " ", 0x3002: ".", 0x3001: ","}
_TEXT = re.compile(r"\\(?:text|textrm|textnormal|textup|mbox|hbox|mathrm|mathsf|rm)\s?\{([^{}\\]*)\}")
_STYLED = re.compile(
    r"\\(?:textbf|textit|emph|underline|mathbf|mathit|boldsymbol|bm|operatorname)\s?\{((?:[^{}\\]|\\.|\{[^{}]*\})*)\}"
)
_DEGREES = re.compile(r"\^\s?\{?\s?\\circ\s?\}?|\\degrees?(?![A-Za-z])|°")
_LOOKS = re.compile(
    r"(?<!\\)\\[()\[\]]|\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|bf|rm)(?![A-Za-z])|\\q?quad(?![A-Za-z])"
    r"|\\?[$€£]|\*\*|`|<<[^<>\n]{0,200}>>"
)
_EMPTY_SET = re.compile(r"\\varnothing(?![A-Za-z])|∅")
_SHORT_FRAC = re.compile(r"\\([dtc]?)frac\s?(\d|\{[^{}]*\})\s?(\d|\{[^{}]*\})")
_DOUBLED = re.compile(
    r"\\\\(?:d?frac|sqrt|left|right|text|pi|infty|cdot|times|cup|le|ge|leq|geq|circ|begin)(?![A-Za-z])"
)
_MATRIX = re.compile(r"[\[(]\s?\\begin\{array\}(?:\{[a-z| ]*\})?(.*?)\\end\{array\}\s?[\])]", re.DOTALL)
_ROOT_OF_FRACTION = re.compile(r"\\sqrt\s?(\\[dtc]?frac\{[^{}]*\}\{[^{}]*\})")
_TRAILING = " \t\r\n.;:,\\"
MAX_LENGTH = 4000
"""Most characters of an answer. A longer text equals only a gold answer with the same text."""


def cleaned(text: str) -> str:
    """Return ``text`` with one spelling for each thing that LaTeX can write in several ways.

    A word of ``\\text{…}`` gets the mark :data:`WORD`; set braces become :data:`SET_OPEN` and :data:`SET_CLOSE`; tight
    commas and thin spaces become what :func:`tightened` makes of them. Dollar signs, sizes, display marks and a final
    stop are removed. A text longer than :data:`MAX_LENGTH` is returned unchanged.
    """
    if len(text) > MAX_LENGTH:
        return text
    if _DOUBLED.search(text):  # backslashes escaped twice, for example by JSON
        text = text.replace("\\\\", "\\")
    text = tightened(text.translate(_FULL_WIDTH))
    text = _STYLED.sub(r" \1 ", text)
    text = _TEXT.sub(lambda match: f" {re.sub('[A-Za-z]+', lambda word: WORD + word[0], match[1])} ", text)
    text = _DEGREES.sub(f" {WORD}degrees ", text).replace("\\%", "%")
    text = _LOOKS.sub(" ", text)
    text = _EMPTY_SET.sub(r"\\emptyset ", text)
    text = re.sub(r"\\\{|\\lbrace(?![A-Za-z])", SET_OPEN, text)
    text = re.sub(r"\\\}|\\rbrace(?![A-Za-z])", SET_CLOSE, text)
    text = _MATRIX.sub(r"\\begin{pmatrix}\1\\end{pmatrix}", text)
    text = re.sub(r"\\(begin|end)\{[bB]matrix\}", r"\\\1{pmatrix}", text)
    text = _SHORT_FRAC.sub(_long_frac, text)
    text = _ROOT_OF_FRACTION.sub(r"\\sqrt{\1}", text)  # math-verify reads \sqrt\frac{1}{4} as 1/4
    return re.sub(r"[ \t]+(\^?)", lambda blank: blank[1] or " ", text).rstrip(_TRAILING).lstrip(" \t\r\n:")


_BARE_FUNCTION = re.compile(r"(?<![A-Za-z\\])(sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|log|ln|exp|pi)(?![A-Za-z])")
_BARE_ROOT = re.compile(r"(?<![A-Za-z\\])sqrt ?\(([^()]*)\)")


def _long_frac(match: re.Match[str]) -> str:
    above, below = (part if part.startswith("{") else f"{{{part}}}" for part in match.groups()[1:])
    return f"\\frac{above}{below}"


def literal(text: str) -> str:
    """Return a cleaned text without marks and extra spaces. Two answers with the same literal text are equal."""
    return re.sub(r"\s+", " ", text.replace(WORD, "")).rstrip(_TRAILING).lstrip()


def latex(text: str) -> str:
    """Turn a cleaned text back into LaTeX."""
    for mark, spelling in ((WORD, ""), (SET_OPEN, "\\{"), (SET_CLOSE, "\\}"), ("\x04", ",")):
        text = text.replace(mark, spelling)
    return _BARE_FUNCTION.sub(r"\\\1", _BARE_ROOT.sub(r"\\sqrt{\1}", text))
