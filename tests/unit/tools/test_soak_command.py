"""The command that a soak starts, when the soak itself is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.present import present

ROOT = Path(__file__).parents[3]
SOAK = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tools.soak_parts.soak import LocalCommand, Soak

launch = LocalCommand(Path("none.yaml"), [])
launch.command = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"]
soak = Soak(launch, Path(sys.argv[1]) / "run", mean_gap_s=600.0, max_faults=0, seed=1, say=print)
print("begins", flush=True)
with ThreadPoolExecutor() as pool:
    list(pool.map(soak.run, [600.0]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_run_ends_with_a_soak_that_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    tool = subprocess.Popen([sys.executable, "-c", SOAK, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert present(tool.stdout).readline() == "begins\n"
    log = tmp_path / "run.log"
    while not (log.is_file() and log.read_text().endswith("\n")):
        assert tool.poll() is None
    run = psutil.Process(int(log.read_text()))
    tool.send_signal(number)
    tool.wait(30)
    present(tool.stdout).close()
    _, alive = psutil.wait_procs([run], timeout=30)
    for one in alive:
        one.kill()
    assert not alive
