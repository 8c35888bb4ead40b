"""Put the folders of the examples on the path: they are scripts, not a package."""

from __future__ import annotations

import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[3] / "examples"
sys.path += [str(EXAMPLES), str(EXAMPLES / "quickstart"), str(EXAMPLES / "gsm8k_tiny")]
