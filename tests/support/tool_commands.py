"""Run the scripts of tools/ in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).parents[2] / "tools"


def run_tool(name: str, *arguments: object, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Run ``tools/<name>`` for at most ``timeout`` seconds; return its exit status and its output."""
    command = [sys.executable, TOOLS / name, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=timeout, check=False)
