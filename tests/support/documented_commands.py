"""The commands that a page shows, as lists of words."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

_FENCE = re.compile(r"^```(\w*)$")
_ASSIGNMENT = re.compile(r"[A-Z_]+=.*")


@dataclass(frozen=True)
class Command:
    """One command of a page."""

    page: str
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.line} {' '.join(self.words[:3])}"


def commands_of(page: str, text: str) -> Iterator[Command]:
    """Yield the commands of ``bash`` and ``console`` blocks, and the indented lines that begin with megatron-dypo.

    Comments, prompts, assignments before a command and lines of output are left out; lines that end in a backslash
    go on.
    """
    language, start, pending = None, 0, ""
    for number, line in enumerate(text.splitlines(), start=1):
        if fence := _FENCE.match(line.strip()):
            language = fence[1] if language is None else None
            continue
        is_shell = language == "bash" or (language == "console" and line.startswith("$ "))
        is_indented = language is None and line.startswith("    megatron-dypo ")
        if not (is_shell or is_indented or pending):
            continue
        start = start if pending else number
        pending += line.strip().removeprefix("$ ")
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        words = shlex.split(pending, comments=True)
        pending = ""
        while words and (_ASSIGNMENT.fullmatch(words[0]) or words[0] == "export"):
            words = words[1:]
        if words:
            yield Command(page, start, tuple(words))
