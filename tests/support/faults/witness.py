"""The witness of a fault: one line in a file, written when the fault happens."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_witness(facts: Mapping[str, Any]) -> None:
    """Append a line with ``facts``, this process and the moment (monotonic clock) to the file ``facts["witness"]``."""
    line = json.dumps({**facts, "pid": os.getpid(), "at": time.monotonic()}) + "\n"
    with Path(facts["witness"]).open("a", encoding="utf-8") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
