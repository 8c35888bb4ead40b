"""The functions of slurm/common.sh and supervise.sh without Slurm."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job: ``job(SCRIPT)`` sources supervise.sh with stand-ins for Slurm's commands; it returns the output."""

    logs: Path

    def __call__(self, script: str, **environment: str) -> tuple[int, str]:
        stand_ins = 'scontrol() { echo "scontrol $*"; }; squeue() { echo "${STATE:-RUNNING}"; }; stop_roles() { :; }\n'
        source = f"set -euo pipefail; declare -A PID=(); source {REPOSITORY}/slurm/common.sh\n"
        settings = {"DYPO_HOME": str(REPOSITORY), "DYPO_LOGS": str(self.logs), "LOG_ROOT": str(self.logs.parents[1])}
        settings |= {"ATTEMPT": "1", "SLURM_JOB_ID": "12", "SLURM_JOB_NAME": "dypo", "JOB": "12"}
        done = subprocess.run(
            ["bash", "-c", source + stand_ins + script],
            env={**os.environ, **settings, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr
