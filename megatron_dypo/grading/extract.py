"""Where a response states its final answer."""

from __future__ import annotations

import re

_HASHES = re.compile(r"####[ \t]*(\S[^\n]*)")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


def last_boxed(text: str) -> str | None:
    """Content of the last ``\\boxed{…}`` whose braces are balanced; None if there is none.

    >>> last_boxed(r"\\boxed{1} or rather \\boxed{\\frac{1}{2}}")
    '\\\\frac{1}{2}'
    """
    for match in reversed(list(_BOX.finditer(text))):
        depth = 1
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[match.end() : end].strip()
    return None


def last_marked(text: str) -> str | None:
    """The answer that ``text`` marks: its last box; without one, what follows its last ``####`` (as in GSM8K)."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    marked = _HASHES.findall(text)
    return marked[-1].strip() if marked else None
