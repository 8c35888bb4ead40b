"""Exact match of the final answer, as a string."""

from __future__ import annotations

import re
import unicodedata

from megatron_dypo.grading.extract import last_boxed

_STATED = re.compile(r"(?:answer\s+is|answer\s*[:=]|####)\s*:?[ \t]*(\S[^\n]*)", re.IGNORECASE)


def verify_exact(response: str, answer: str) -> bool:
    """True if the stated answer of ``response`` equals ``answer`` after normalisation.

    The stated answer is the content of the last ``\\boxed{…}``; without one, the rest of the line after the last
    "answer is", "answer:" or "####"; without one, the last line that is not blank. Normalisation: Unicode NFKC, case
    folded, runs of white space are one space, and quotes, ``$``, ``*`` and ``.,;:!`` around the answer are left out.
    """
    return normalized(stated_answer(response)) == normalized(answer)


def stated_answer(response: str) -> str:
    """The part of ``response`` that states its answer; empty for a blank response."""
    boxed = last_boxed(response)
    if boxed is not None:
        return boxed
    stated = _STATED.findall(response)
    if stated:
        return stated[-1]
    lines = [line for line in response.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def normalized(text: str) -> str:
    """``text`` in the form in which answers are compared."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(" .,;:!\"'`“”‘’$*")
