"""The pins of a file of requirements/, and the rules that all of them obey."""

from __future__ import annotations

import re
from pathlib import Path

WITHOUT_HASH = ("torch.txt",)


def pins_of(file: Path) -> list[str]:
    """Return the pins, ``name==version``. Each is exact and is followed by the hashes of its files."""
    text = re.sub(r"^#.*\n", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line.strip()]
    for pin, *hashes in lines:
        assert re.fullmatch(r"[\w.-]+==[\w.!+]+", pin), pin
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", one) for one in hashes), pin
        assert bool(hashes) == (file.name not in WITHOUT_HASH), pin
    return [pin for pin, *_ in lines]
