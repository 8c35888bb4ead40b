"""The examples are scripts, not a package: their folders go on the path, as when they are run."""

from __future__ import annotations

import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[3] / "examples"
sys.path += [str(EXAMPLES), str(EXAMPLES / "quickstart"), str(EXAMPLES / "gsm8k_tiny")]
