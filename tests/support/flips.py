"""Files with one flipped bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path


def flips(path: Path, count: int) -> Iterator[tuple[int, int]]:
    """Write ``path`` with one bit flipped, ``count`` times; yield the byte and the bit. Then put it right again."""
    content = path.read_bytes()
    choose = random.Random(14)
    for _ in range(count):
        place, bit = choose.randrange(len(content)), choose.randrange(8)
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        yield place, bit
    path.write_bytes(content)


def error_of(action: Callable[[], object]) -> str:
    """Return the message of a ValueError; nothing if there is none."""
    try:
        action()
    except ValueError as error:
        return str(error)
    return ""
