"""The API key that trainer, router and servers share. It comes from the environment and is sent in an HTTP header."""

from __future__ import annotations

import os
import re

_PRINTABLE = re.compile(r"[!-~]+")


def read_api_key(name: str) -> str | None:
    """Return the key in the environment variable ``name``; None if it is unset or empty.

    Raises:
        ValueError: the key cannot be sent in a header (spaces, line ends, not ASCII). The message does not show it.
    """
    key = os.environ.get(name)
    if key and not _PRINTABLE.fullmatch(key):
        raise ValueError(f"{name}: must be printable ASCII characters without spaces or line ends, got others as well")
    return key or None
