"""A run from Python: the processes of ``megatron-dypo train``, and the cause of their end as a value."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_dypo.config.reading.load import dump_config
from megatron_dypo.config.tree import Config
from megatron_dypo.ending import Cause, cause_of_status


def run_training(config: Config) -> Cause:
    """Train as ``megatron-dypo train`` does, in new processes, and return why the run ended.

    The function starts as many local ranks as the layout needs, or resumes the run of the run folder. Their messages go
    to this process's standard error and to the run folder. Ctrl-C reaches them too: after the first one the run saves a
    checkpoint and ends.

    Raises:
        RuntimeError: the exit status is that of no cause, for example because the run was killed.
    """
    with tempfile.TemporaryDirectory(prefix="megatron_dypo_") as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(dump_config(config), encoding="utf-8")
        process = subprocess.Popen([sys.executable, "-m", "megatron_dypo.cli", "train", str(path)])
        status = _wait(process)
    cause = cause_of_status(status)
    if cause is None:
        raise RuntimeError(f"run.dir={config.run.dir}: the run ended with status {status}, which is that of no cause")
    return cause


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Wait for the end in spite of Ctrl-C: the run gets it too, and ends when it has saved."""
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue
