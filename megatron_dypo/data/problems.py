"""The first problems of many, and their number: an error lists a few, whatever the size of a file."""

from __future__ import annotations

_SHOWN = 20


class Problems:
    """Problems of rows, a line of text each. All are counted, and the first 20 kept."""

    def __init__(self) -> None:
        self._first: list[str] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, line: str) -> None:
        """Note a problem."""
        self._count += 1
        if self._count <= _SHOWN:
            self._first.append(line)

    def under(self, head: str) -> str:
        """Return the text of an error: ``head``, the first problems below it, and how many are left."""
        rest = self._count - len(self._first)
        return "\n".join([head, *self._first, *([f"  and {rest} more"] if rest else [])])
