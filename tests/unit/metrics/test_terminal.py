"""Standard streams that cannot be written: a run goes on, and ends with its own status."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dypo.metrics.terminal import Terminal

LOGGING_PROGRAM = """
import logging, sys
from megatron_dypo.metrics.logs import log_to_terminal
from megatron_dypo.metrics.progress import progress
from megatron_dypo.metrics.terminal import survive_terminal

{survive}
log_to_terminal()
with progress(3, "rollouts", "prompts") as bar:
    for _ in range(3):
        logging.getLogger("megatron_dypo").warning("a line" * 1000)
        bar.update()
print("the end" * 1000)
open(sys.argv[1], "w").write("went on")
sys.exit(75)
"""


def run(program: str, done: Path, stream: int) -> int:
    command = [sys.executable, "-c", program, str(done)]
    return subprocess.run(command, stdout=stream, stderr=stream, timeout=120, check=False).returncode


@pytest.mark.parametrize("kind", ["a full disk", "a pipe that nobody reads"])
def test_a_run_survives_its_terminal_and_keeps_its_exit_status(tmp_path: Path, kind: str) -> None:
    if kind == "a full disk":
        stream = os.open("/dev/full", os.O_WRONLY)
    else:
        reading, stream = os.pipe()
        os.close(reading)
    try:
        alone, survived = tmp_path / "alone", tmp_path / "survived"
        run(LOGGING_PROGRAM.format(survive=""), alone, stream)
        assert not alone.exists(), "without it the first line ends the program"
        assert run(LOGGING_PROGRAM.format(survive="survive_terminal()"), survived, stream) == 75
        assert survived.read_text() == "went on"
    finally:
        os.close(stream)


def test_what_can_be_written_is_written() -> None:
    stream = io.StringIO()
    terminal = Terminal(stream)
    assert terminal.write("a line\n") == 7
    terminal.flush()
    assert stream.getvalue() == "a line\n"
    stream.close()
    assert terminal.write("lost") == 4
    terminal.flush()
    assert terminal.closed
