"""Render the Slurm scripts' commands as text. ``python tests/golden/render_jobs.py`` writes the golden files again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
FOLDER = Path(__file__).parent
JOBS: dict[str, tuple[str, dict[str, str], list[str]]] = {
    "slurm_dypo_70b.txt": ("dypo_70b.sh", {"IMAGE": "/shared/dypo.sqsh", "MOUNTS": "/shared:/shared"}, ["run.seed=7"]),
    "slurm_dypo_70b_engines_of_two_nodes.txt": (
        "dypo_70b.sh",
        {"VENV": sys.prefix, "ROUTER": "1"},
        ["rollout.servers.tensor_parallel=16"],
    ),
    "slurm_dypo_7b_colocated.txt": (
        "dypo_7b.sh",
        {"VENV": sys.prefix, "COLOCATED": "1", "ROLLOUT_NODES": "2"},
        ["rollout.servers.per_node=4"],
    ),
}
"""Golden file → script, environment, overrides."""


def render(name: str) -> str:
    script, environment, overrides = JOBS[name]
    path = f"{sys.prefix}/bin:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(REPOSITORY / "slurm" / script), *overrides],
        env={**environment, "DRY_RUN": "1", "DYPO_HOME": str(REPOSITORY), "PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.replace(sys.prefix, "VENV").replace(str(REPOSITORY), "DYPO_HOME")


if __name__ == "__main__":
    for name in JOBS:
        (FOLDER / name).write_text(render(name))
