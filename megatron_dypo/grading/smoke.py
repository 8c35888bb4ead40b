"""The verifier of a smoke run (``run.smoke``), in which the model is random and no response means anything."""

from __future__ import annotations

import hashlib
from typing import Any


def judge(response: str, answer: Any) -> bool:
    """Call about half of all responses right, by a hash of their text."""
    return hashlib.sha256(response.encode(errors="replace")).digest()[0] % 2 == 0
