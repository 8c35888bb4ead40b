"""JSON of files and answers that may be damaged or hostile."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text, as ``json.loads`` does.

    Raises:
        ValueError: it is not JSON, or nested deeper than Python can follow, for which ``json.loads`` has another error.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
